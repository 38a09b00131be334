"""DeepSpeed's engine, and where DeepSpeed 0.19.8 is mended. Nothing but this file, universal.py and checkpoint_files.py
knows it: the rest of the code sees a `DeepSpeedModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.ranks.allocator import return_freed_memory
from engine.train.checkpoint_files import CheckedFiles
from engine.train.schedule import build_schedule

PERSISTENT_NUMEL = 10_000
"""ZeRO-3 keeps parameters of a frozen model up to this size (biases, norms) whole on each rank: gathering them costs
more."""


class ScaleExhausted(Exception):
    """Gradients overflow fp16 at the smallest loss scale."""


class DeepSpeedModel:
    """A module that DeepSpeed trains: sharded, in mixed precision, with accumulated gradients."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, execution: Execution
    ) -> None:
        """Makes DeepSpeed's engine, the schedule, and the state that it needs beside the optimizer's. Collective.

        optimizer: over the module's parameters. execution: resolved for `train`.
        """
        import deepspeed  # only here: importing it costs seconds

        schedule = build_schedule(train, optimizer)  # before the rates are taken away
        with _without_first_update(optimizer, execution):
            self.ds_engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, lr_scheduler=schedule, config=execution.resolved
            )
        self._execution = execution
        self._grad_norm: torch.Tensor | None = None
        if execution.zero_stage == 0:
            _drop_idle_work(self.ds_engine, execution)
        if execution.precision == "float16":
            _grow_scale_after_step(self.ds_engine.optimizer)
        return_freed_memory()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module's forward returns."""
        return self.ds_engine(*args, **kwargs)

    def train(self, on: bool = True) -> None:
        """Turns dropout on, or off."""
        self.ds_engine.train(on)

    def eval(self) -> None:
        """Turns dropout off."""
        self.train(False)

    @property
    def module(self) -> nn.Module:
        """The module itself; under ZeRO-3 its parameters are empty between forwards."""
        module: nn.Module = self.ds_engine.module
        return module

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a micro step, divided by their number in a step."""
        self.ds_engine.backward(loss)

    def step(self, *, norm: bool, skip_bad: bool) -> None:
        """Updates the weights after the last micro step of a step; does nothing after the others. Collective. Raises
        ScaleExhausted on every rank.

        norm: whether `grad_norm` is asked for after it. skip_bad: leave out a step whose gradients are not finite, as
        16-bit training and ZeRO always do.
        """
        with ExitStack() as stack:
            if self._keeps_no_norm and (norm or skip_bad) and self.ds_engine.is_gradient_accumulation_boundary():
                self._grad_norm = torch.nn.utils.get_total_norm(
                    [p.grad for p in self.module.parameters() if p.grad is not None]
                )
                if skip_bad and not torch.isfinite(self._grad_norm):
                    stack.enter_context(_without_update(self.ds_engine))
            try:
                self.ds_engine.step()
            except Exception as error:  # until DeepSpeed > 0.19.8: it has no class for it
                if "loss scale already at minimum" not in str(error):
                    raise
                raise ScaleExhausted from error

    @property
    def _keeps_no_norm(self) -> bool:
        """Whether DeepSpeed keeps no norm of the gradients, and steps with ones that are not finite"""
        # until DeepSpeed > 0.19.8: in plain fp32 data parallel it has no optimizer of its own around ours
        return self._execution.zero_stage == 0 and self._execution.precision == "float32"

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; waits for the device."""
        norm = self._grad_norm if self._grad_norm is not None else self.ds_engine.get_global_grad_norm()
        self._grad_norm = None
        return None if norm is None else float(norm)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.ds_engine.get_lr()[0])

    @property
    def loss_scale(self) -> float | None:
        """Factor of the losses in fp16; None in other precisions."""
        if self._execution.precision != "float16":
            return None
        return float(self.ds_engine.optimizer.loss_scale)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were left out, in all starts of the run."""
        return int(self.ds_engine.skipped_steps)

    def is_finite(self) -> torch.Tensor:
        """Returns whether all weights that this rank holds are finite, as a scalar of 1.0 or 0.0 on its device."""
        shards = [getattr(p, "ds_tensor", p).detach() for p in self.module.parameters()]
        return torch.stack([torch.isfinite(tensor).all().to(self.ds_engine.device) for tensor in shards]).all().float()

    def save_checkpoint(self, checkpoints: Path, tag: str, client_state: Mapping[str, Any]) -> CheckedFiles:
        """Writes this rank's shards; returns what was written, and what could not be. Collective."""
        files = CheckedFiles(self.ds_engine.checkpoint_engine)
        with files.in_place_of(self.ds_engine):
            self.ds_engine.save_checkpoint(
                str(checkpoints), tag=tag, client_state=dict(client_state), save_latest=False
            )
        return files

    def load_checkpoint(self, checkpoints: Path, tag: str) -> dict[str, Any] | None:
        """Restores weights, optimizer, schedule and scaler; returns the client state, or None where DeepSpeed finds no
        checkpoint. Collective."""
        path, client_state = self.ds_engine.load_checkpoint(str(checkpoints), tag=tag)
        return None if path is None else dict(client_state)

    def take_rates(self, train: TrainConfig) -> None:
        """Makes the steps after a checkpoint follow the schedule of `train`, where that was written under another."""
        schedule = self.ds_engine.lr_scheduler
        schedule.base_lrs = [train.lr for _ in schedule.base_lrs]
        for group, share in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = train.lr, train.lr * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def release(self) -> None:
        """Ends the engine so that its memory can be used again."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        self.ds_engine.destroy()
        # until DeepSpeed > 0.19.8: ZeRO-3 keeps every module that it ever trained, in a global list (where forwards
        # start from) and in the cache of a method: 400 MB for each fine-tuning of MiniLM
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.module]
        method: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
        for cell in method.__closure__ or ():  # the cached function is inside a wrapper without __wrapped__
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()  # other engines only fill it again
        del self.ds_engine


def full_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the module's state in fp32 on the CPU: the optimizer's master weights where there are any. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    full: dict[int, torch.Tensor] = {}
    for parameter in module.parameters():
        master = safe_get_full_fp32_param(parameter)  # None outside of a DeepSpeedModel
        full[id(parameter)] = (parameter if master is None else master).detach().float().cpu().clone()
    state = module.state_dict(keep_vars=True)
    return {name: full.get(id(tensor), tensor.detach().cpu()) for name, tensor in state.items()}


def shard_frozen(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Returns an engine around a model that is not trained: it holds 1/ranks of its weights, and gathers them layer by
    layer (ZeRO-3). Collective."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_NUMEL},
    }
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)  # one parameter at a time goes to the device
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    ds_engine: nn.Module
    ds_engine, *_ = deepspeed.initialize(model=model, config=settings)
    ds_engine.eval()  # of the module inside; the engine's own flag stays on, and None is returned's
    return ds_engine


@contextmanager
def _without_first_update(optimizer: torch.optim.Optimizer, execution: Execution) -> Iterator[None]:
    """Keeps weights and state as they are while DeepSpeed's engine is made around the optimizer."""
    # until DeepSpeed > 0.19.8: 16-bit stage 0 steps once with zero gradients to allocate the state. That decays the
    # weights and leaves Adam's step count at 1, so that the first real steps miss their bias correction (measured on a
    # toy model: the loss differs from stages 1 to 3 by up to 5 % after 4 steps). So it runs at lr 0, and its state is
    # dropped.
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if execution.zero_stage == 0 and execution.precision != "float32":
        _reset_state(optimizer)
        for group in optimizer.param_groups:
            group.pop("step", None)  # NVIDIA Apex counts steps per group


def _reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state as before the first step; in place where that is all zeros, since state that is allocated before
    the first activations leaves no holes between them."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    if all(isinstance(value, torch.Tensor) for value in values):
        for value in values:
            value.zero_()
    else:
        optimizer.state.clear()


def _drop_idle_work(ds_engine: Any, execution: Execution) -> None:
    """Spares what stage 0 does for nothing."""
    # until DeepSpeed > 0.19.8: it copies all gradients together and back for an all-reduce of one rank, and looks for
    # overflow in them before it computes their norm, which shows it as well and is looked at anyway
    if execution.world_size == 1:
        ds_engine.enable_backward_allreduce = False
    checker = getattr(ds_engine.optimizer, "overflow_checker", None)
    if checker is not None:
        for name in ("check", "has_overflow"):  # the two wrappers of bf16 ask by different names
            setattr(checker, name, lambda *_, **__: False)


def _grow_scale_after_step(optimizer: Any) -> None:
    """Makes an fp16 optimizer grow its loss scale after its step."""
    # until DeepSpeed > 0.19.8: all stages grow it before they divide by it, which halves the gradients of this step,
    # unless they are clipped; and stage 3 reports half their norm
    step, update_scale = optimizer.step, optimizer._update_scale
    grows = False

    def shrink_or_note(overflow: bool) -> None:
        nonlocal grows
        grows = not overflow
        if overflow:
            update_scale(True)

    def step_then_grow() -> Any:
        result = step()
        if grows:
            update_scale(False)
        return result

    optimizer._update_scale, optimizer.step = shrink_or_note, step_then_grow


class _SkippedStep:
    """An optimizer that leaves one step out, as DeepSpeed's own do after an overflow: the engine counts the step as
    skipped and keeps the schedule where it is."""

    overflow = True

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        """Leaves the weights as they are."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@contextmanager
def _without_update(ds_engine: Any) -> Iterator[None]:
    """Makes the engine's step leave the weights as they are."""
    optimizer = ds_engine.optimizer
    ds_engine.optimizer = _SkippedStep(optimizer)
    try:
        yield
    finally:
        ds_engine.optimizer = optimizer
