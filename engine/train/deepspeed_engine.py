"""DeepSpeed's engine: how it is made and ended, and where DeepSpeed 0.19.8 is mended."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.ranks.allocator import return_freed_memory
from engine.train.optim import ChosenOptimizer, build_schedule


def start_engine(module: nn.Module, chosen: ChosenOptimizer, train: TrainConfig, execution: Execution) -> Any:
    """The DeepSpeed engine around the module."""
    return initialize_engine(module, chosen.optimizer, build_schedule(train, chosen.optimizer), execution)


def initialize_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    execution: Execution,
) -> Any:
    """`deepspeed.initialize`, without the hidden update of its 16-bit stage 0, and with the loss scale of fp16 mended.

    There DeepSpeed 0.19.8 steps the optimizer once with zero gradients to allocate its state. That decays the weights
    and leaves Adam's step count at 1, so that the first real steps miss their bias correction (measured on a toy
    model: the loss differs from stages 1 to 3 by up to 5 % after 4 steps). So it runs at lr 0 and its state is dropped.
    """
    import deepspeed

    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ds_engine, _, _, _ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=schedule, config=execution.resolved
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _drop_idle_work(ds_engine, execution)
    if execution.zero_stage == 0 and execution.precision != "float32":
        _reset_state(optimizer)
        for group in optimizer.param_groups:
            group.pop("step", None)  # NVIDIA Apex counts steps per group
    if execution.precision == "float16":
        mend_loss_scale(ds_engine, execution)
    return_freed_memory()
    return ds_engine


def _reset_state(optimizer: torch.optim.Optimizer) -> None:
    """As before the first step. In place where that is all zeros: state that is allocated before the first activations
    leaves no holes between them."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    if all(isinstance(value, torch.Tensor) for value in values):
        for value in values:
            value.zero_()
    else:
        optimizer.state.clear()


def _drop_idle_work(ds_engine: Any, execution: Execution) -> None:
    """Of DeepSpeed's stage 0: it copies all gradients together and back for an all-reduce of one rank, and looks for
    overflow in them before it computes their norm, which shows it as well and is looked at anyway."""
    if execution.zero_stage > 0:
        return
    if execution.world_size == 1:
        ds_engine.enable_backward_allreduce = False
    checker = getattr(ds_engine.optimizer, "overflow_checker", None)
    if checker is not None:
        for name in ("check", "has_overflow"):  # the two wrappers of 16-bit stage 0 ask by different names
            setattr(checker, name, lambda *_, **__: False)


def mend_loss_scale(ds_engine: Any, execution: Execution) -> None:
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


def release(ds_engine: Any) -> None:
    """Ends an engine so that its memory can be used again.

    DeepSpeed 0.19.8's ZeRO-3 keeps every module that it ever trained, in a global list (where forwards start from) and
    in the cache of a method: 400 MB for each fine-tuning of MiniLM. Other engines only fill the cache again.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    ds_engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not ds_engine.module]
    method: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in method.__closure__ or ():  # the cached function is inside a wrapper without __wrapped__
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
