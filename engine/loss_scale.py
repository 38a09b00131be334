"""The loss scale of fp16, where DeepSpeed 0.19.8 handles it wrongly."""

from __future__ import annotations

from typing import Any

import torch

from engine.config.deepspeed import Execution


def mend(ds_engine: Any, execution: Execution) -> None:
    """Changes the step of an fp16 engine, and its backward under ZeRO stage 0; this engine only.

    - All stages grow the scale before they divide by it. That halves the gradients of this step, unless they are
      clipped, and stages 0 and 3 report half their norm. It grows after the step instead.
    - Stage 0 does not scale the loss, though it divides by the scale (DeepSpeed's pull request 8393): small gradients
      become 0, and none is ever clipped, as their norm is divided too.
    - Its unfused optimizer reports the norm of the scaled gradients (pull request 8588).
    - It goes on for ever when gradients overflow at the smallest scale. It raises then, as the others do.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = ds_engine.optimizer
    step, update_scale = optimizer.step, optimizer._update_scale
    grows = False

    def shrink_or_note(overflow: bool) -> None:
        nonlocal grows
        grows = not overflow
        if overflow:
            if execution.zero_stage == 0:
                _require_a_smaller_scale(optimizer.loss_scale_config)
            update_scale(True)

    def step_then_grow() -> Any:
        result = step()
        if grows:
            if isinstance(optimizer, FP16_UnfusedOptimizer):
                optimizer._global_grad_norm = optimizer._global_grad_norm / optimizer.loss_scale_config.cur_scale
            update_scale(False)
        return result

    optimizer._update_scale, optimizer.step = shrink_or_note, step_then_grow
    if execution.zero_stage == 0:
        _scale_losses(ds_engine, execution.grad_accum_steps)


def _scale_losses(ds_engine: Any, grad_accum_steps: int) -> None:
    backward, scale = ds_engine.backward, ds_engine.optimizer.loss_scale_config

    def scaled_backward(loss: torch.Tensor) -> torch.Tensor:
        loss = loss.float()  # a scale of 2^16 is infinite in fp16
        # sets what arrives at the loss, whatever DeepSpeed has multiplied it by: right once it scales the loss, too
        loss.register_hook(lambda gradient: torch.full_like(gradient, scale.cur_scale / grad_accum_steps))
        return backward(loss)

    ds_engine.backward = scaled_backward


def _require_a_smaller_scale(scale: Any) -> None:
    if scale.dynamic_loss_scale and scale.cur_scale <= scale.min_loss_scale:
        raise RuntimeError("Current loss scale already at minimum: it cannot decrease any more")
