"""One model in training: its DeepSpeed engine, what is logged of it, what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.data.batch import Batch, Counts
from engine.errors import RunFailure
from engine.models.features import Features
from engine.ranks.runtime import Runtime
from engine.train.checkpoint import Checkpointer, CheckpointFailed
from engine.train.loss_window import BadMicroStep, LossWindow, WindowReport
from engine.train.monitor import Monitor
from engine.train.step_report import Interval, PhaseTimer, StepReport

SequenceIds = Callable[[BadMicroStep], list[int]]
"""The numbers of the sequences of a micro step."""


class Trainee:
    """One model in training: its engine, and what is seen and kept of it.

    ds_engine: around a module whose forward(batch, teacher features, per_micro) returns the total (scalar,
    differentiable) and the raw terms (T,), then what is observed (O,), normalised as DistilModule.forward says.
    """

    def __init__(
        self,
        ds_engine: Any,
        *,
        train: TrainConfig,
        term_names: Sequence[str],
        coefficients: Sequence[float],
        observed_names: Sequence[str] = (),
        execution: Execution,
        runtime: Runtime,
        monitor: Monitor,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.ds_engine = ds_engine
        self.term_names, self.coefficients = tuple(term_names), tuple(coefficients)
        self.observed_names = tuple(observed_names)
        self.execution, self.runtime = execution, runtime
        self.monitor, self.checkpointer = monitor, checkpointer
        self.diverged = False
        self.stopped = False
        """Whether its evaluation has ended it before the others."""
        self.skipped: list[int] = []
        """Steps of this start whose loss was not finite, and which were left out (train.skip_bad_steps)."""
        self._may_skip = train.skip_bad_steps
        self._timer = PhaseTimer(runtime.device)
        self._window = LossWindow(
            len(self.term_names) + len(self.observed_names),
            runtime.device,
            length=train.log_every,
            grad_accum_steps=execution.grad_accum_steps,
            rank=runtime.rank,
            ranks=runtime.world_size,
        )
        self._grad_norm: torch.Tensor | float | None = None

    def micro_step(
        self,
        batch: Batch,
        features: Features | None,
        per_micro: Counts,
        *,
        last_user: bool,
        step: int,
        micro: int,
        logged: bool,
        ids: SequenceIds,
    ) -> None:
        """One forward and backward; the last micro step of a step also updates the weights. micro: its number, from 0.
        last_user: nobody else needs the features, so their memory may serve the backward pass."""
        with self._timer.phase("student"):
            total, terms = self.ds_engine(batch, features, per_micro)
            if features is not None and last_user:
                features.release()
            self.ds_engine.backward(total)  # divides by accumulation itself
        self._window.add(total, terms, step=step, micro=micro)
        last_micro = micro + 1 == self.execution.grad_accum_steps
        with self._timer.phase("optimizer"), ExitStack() as stack:
            if last_micro and self._has_bare_gradients and not self._gradients_are_usable(logged):
                stack.enter_context(_without_update(self.ds_engine))
            self._step(step, ids)

    @property
    def _has_bare_gradients(self) -> bool:
        """Plain fp32 data parallel, where DeepSpeed has no optimizer of its own around ours."""
        return self.execution.zero_stage == 0 and self.execution.precision == "float32"

    def _gradients_are_usable(self, logged: bool) -> bool:
        """DeepSpeed keeps no gradient norm here, so it is taken before the step; and it would step with gradients that
        are not finite, where its other optimizers leave the step out."""
        if not logged and not self._may_skip:
            return True
        gradients = [p.grad for p in self.ds_engine.module.parameters() if p.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        return not self._may_skip or bool(torch.isfinite(self._grad_norm))

    def _step(self, step: int, ids: SequenceIds) -> None:
        try:
            self.ds_engine.step()  # updates the weights on the last micro step only
        except Exception as error:  # DeepSpeed has no class for it; every rank raises it in the same step
            if "loss scale already at minimum" not in str(error):
                raise
            self.diverged = True
            first = self._window.reduce().first_bad
            self.monitor.diverged_scale(step, self._names(first), first, [] if first is None else ids(first))

    def _names(self, bad: BadMicroStep | None) -> list[str]:
        """The terms among the values that were not finite."""
        return [] if bad is None else [self.term_names[i - 1] for i in bad.values if 0 < i <= len(self.term_names)]

    def log(self, interval: Interval, ids: SequenceIds) -> None:
        """Collective. Reports the interval, and what was not finite in it."""
        window = self._window.reduce()
        interval = replace(interval, phases={**interval.phases, **self._timer.read()})
        means = window.means
        terms, observed = means[1 : 1 + len(self.term_names)], means[1 + len(self.term_names) :]
        norm = self._grad_norm if self._grad_norm is not None else self.ds_engine.get_global_grad_norm()
        report = StepReport(
            interval=interval,
            total=means[0],
            terms=dict(zip(self.term_names, terms, strict=True)),
            observed=dict(zip(self.observed_names, observed, strict=True)),
            coefficients=dict(zip(self.term_names, self.coefficients, strict=True)),
            lr=float(self.ds_engine.get_lr()[0]),
            grad_norm=None if norm is None else float(norm),
            loss_scale=_loss_scale(self.ds_engine, self.execution.precision),
            skipped_steps=int(self.ds_engine.skipped_steps),
        )
        self._grad_norm = None
        if window.bad_steps:
            self._report_bad(window, report, ids)
        if not self.diverged:
            self.monitor.step(report)

    def _report_bad(self, window: WindowReport, report: StepReport, ids: SequenceIds) -> None:
        assert window.first_bad is not None
        self.skipped += window.bad_steps
        self.diverged = len(self.skipped) > self._may_skip
        self.monitor.not_finite(
            report,
            terms=self._names(window.first_bad),
            first=window.first_bad,
            sequences=ids(window.first_bad),
            bad_steps=window.bad_steps,
            skipped=None if self.diverged else len(self.skipped),
            may_skip=self._may_skip,
        )

    def check_weights(self, step: int) -> bool:
        """Collective. Whether all weights are finite; says so when not. The losses of a step are computed before its
        update, so they cannot tell. Under ZeRO-3 each rank looks at its own shards."""
        held = [getattr(p, "ds_tensor", p).detach() for p in self.ds_engine.module.parameters()]
        finite = torch.stack([torch.isfinite(tensor).all().to(self.runtime.device) for tensor in held]).all().float()
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite.item():
            self.diverged = True
            self.monitor.diverged_weights(step)
        return not self.diverged

    def save(self, step: int, state: dict[str, Any], *, needed: bool) -> None:
        """Collective. Writes a checkpoint, unless the weights are not finite: then resume finds an older one.

        needed: this is the last chance, at the end or before a preemption. Raises RunFailure when it could not be
        written and is needed, or checkpoint.on_error says stop.
        """
        if self.checkpointer is None or not self.check_weights(step):
            return
        try:
            folder = self.checkpointer.save(self.ds_engine, step, state)
        except CheckpointFailed as error:
            goes_on = self.checkpointer.on_error == "continue" and not needed
            self.monitor.checkpoint_failed(step, str(error), goes_on=goes_on)
            if not goes_on:
                raise RunFailure(
                    f"{error}. Earlier checkpoints are intact; mend that, and the same command continues from them"
                ) from None
        else:
            self.monitor.checkpoint(step, folder)


class _LeavesOut:
    """In place of an optimizer for one step, as those of DeepSpeed are after an overflow: it counts the step as skipped
    and keeps the schedule where it is."""

    overflow = True

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@contextmanager
def _without_update(ds_engine: Any) -> Iterator[None]:
    optimizer = ds_engine.optimizer
    ds_engine.optimizer = _LeavesOut(optimizer)
    try:
        yield
    finally:
        ds_engine.optimizer = optimizer


def _loss_scale(ds_engine: Any, precision: str) -> float | None:
    if precision != "float16":
        return None
    optimizer = ds_engine.optimizer
    return float(getattr(optimizer, "cur_scale", None) or optimizer.loss_scale)
