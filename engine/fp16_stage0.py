"""fp16 under ZeRO stage 0, where DeepSpeed 0.19.8 handles the loss scale wrongly in three places."""

from __future__ import annotations

from typing import Any

import torch


def mend(ds_engine: Any, grad_accum_steps: int) -> None:
    """Makes stage 0 scale as stages 1 to 3 do. Changes this engine only; right also once DeepSpeed scales the loss.

    - `backward` does not scale the loss, though `step` divides by the scale (its pull request 8393): small gradients
      become 0, and none is ever clipped, as their norm is divided too.
    - `step` grows the scale before it divides by it, which halves the gradients of that step.
    - The unfused optimizer reports the norm of the scaled gradients (its pull request 8588).

    The mended `step` raises, as ZeRO does, when gradients overflow and the scale can shrink no further.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = ds_engine.optimizer
    scale = optimizer.loss_scale_config
    backward, step, update_scale = ds_engine.backward, optimizer.step, optimizer._update_scale

    def scaled_backward(loss: torch.Tensor) -> torch.Tensor:
        loss = loss.float()  # a scale of 2^16 is infinite in fp16
        # sets what arrives at the loss, whatever DeepSpeed has multiplied it by
        loss.register_hook(lambda gradient: torch.full_like(gradient, scale.cur_scale / grad_accum_steps))
        return backward(loss)

    def shrink_only(overflow: bool) -> None:
        if overflow:
            if scale.dynamic_loss_scale and scale.cur_scale <= scale.min_loss_scale:
                raise RuntimeError("Current loss scale already at minimum: it cannot decrease any more")
            update_scale(True)

    def step_then_grow() -> bool:
        overflow = bool(step())
        if not overflow:
            if isinstance(optimizer, FP16_UnfusedOptimizer):
                optimizer._global_grad_norm = optimizer._global_grad_norm / scale.cur_scale
            update_scale(False)
        return overflow

    ds_engine.backward = scaled_backward
    optimizer._update_scale = shrink_only
    optimizer.step = step_then_grow
