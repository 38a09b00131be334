"""One model in training: what is logged of it, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.data.batch import Batch, Counts
from engine.errors import RunFailure
from engine.models.features import Features
from engine.ranks.runtime import Runtime
from engine.train import failures
from engine.train.checkpoint import Checkpointer, CheckpointFailed
from engine.train.deepspeed_engine import DeepSpeedModel, ScaleExhausted
from engine.train.failures import BadPlace
from engine.train.loss_window import BadMicroStep, LossWindow, WindowReport
from engine.train.monitor import Monitor
from engine.train.step_report import Interval, IntervalMeter, StepReport

SequenceIds = Callable[[int, int, int], list[int]]
"""Returns the numbers of the sequences of a step (from 0), a micro step and a rank."""


@dataclass(frozen=True)
class MicroStep:
    """Where in a run a forward and backward pass is."""

    step: int
    """Optimizer step, from 1."""
    micro: int
    """Number within the step, from 0."""
    logged: bool
    """Whether the step will be reported."""


class Terms(Protocol):
    """Names and weights of the values that a module's forward returns beside the total: a LossSet, or a TaskModule."""

    term_names: tuple[str, ...]
    """Names of the raw terms, in their order."""
    coefficients: tuple[float, ...]
    """Weight of each term in the total."""
    observed_names: tuple[str, ...]
    """Names of the values after the terms, which are only reported."""


class Trainee:
    """One model in training, and what is seen and kept of it."""

    def __init__(
        self,
        model: DeepSpeedModel,
        *,
        train: TrainConfig,
        terms: Terms,
        execution: Execution,
        runtime: Runtime,
        monitor: Monitor,
        sequence_ids: SequenceIds,
        checkpointer: Checkpointer | None = None,
        kept: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Takes a model whose forward(batch, teacher features, per_micro) returns the total (scalar, differentiable)
        and the values of `terms` (T,), normalised as DistilModule.forward says; without a checkpointer, `save` does
        nothing. kept: state that every checkpoint holds beside that of training."""
        self.model, self.terms = model, terms
        self.execution, self.runtime = execution, runtime
        self.monitor, self.checkpointer, self._kept = monitor, checkpointer, kept
        self.diverged = False
        """Whether its losses or weights were not finite more often than train.skip_bad_steps allows."""
        self.stopped = False
        """Whether its evaluation has ended it before the others."""
        self.skipped: list[int] = []
        """Steps of this start whose loss was not finite, and which were left out (train.skip_bad_steps)."""
        self.unsaved: set[int] = set()
        """Steps of this start whose checkpoint could not be written (checkpoint.on_error=continue)."""
        self._may_skip = train.skip_bad_steps
        self._sequence_ids = sequence_ids
        self._window = LossWindow(
            len(terms.term_names) + len(terms.observed_names),
            runtime.device,
            length=train.log_every,
            grad_accum_steps=execution.grad_accum_steps,
            rank=runtime.rank,
            ranks=runtime.world_size,
        )

    def micro_step(
        self,
        batch: Batch,
        features: Features | None,
        per_micro: Counts,
        at: MicroStep,
        *,
        last_user: bool,
        meter: IntervalMeter,
    ) -> None:
        """Runs one forward and backward; the last micro step of a step also updates the weights. last_user: nobody else
        needs the features, so their memory may serve the backward pass."""
        with meter.phase("student", self):
            total, terms = self.model(batch, features, per_micro)
            if features is not None and last_user:
                features.release()
            self.model.backward(total)
        self._window.add(total, terms, step=at.step, micro=at.micro)
        try:
            with meter.phase("optimizer", self):
                self.model.step(norm=at.logged, skip_bad=self._may_skip > 0)
        except ScaleExhausted:
            self.diverged = True
            self.monitor.report(failures.scale_exhausted(at.step, self._place(self._window.reduce().first_bad)))

    def _place(self, bad: BadMicroStep | None) -> BadPlace | None:
        if bad is None:
            return None
        names = self.terms.term_names
        terms = [names[i - 1] for i in bad.values if 0 < i <= len(names)]
        sequences = self._sequence_ids(bad.step - 1, bad.micro, bad.rank)
        return BadPlace(bad, tuple(terms), tuple(sequences))

    def log(self, interval: Interval) -> None:
        """Reports the interval, and what was not finite in it. Collective."""
        window = self._window.reduce()
        names, means = self.terms.term_names, window.means
        report = StepReport(
            interval=interval,
            total=means[0],
            terms=dict(zip(names, means[1 : 1 + len(names)], strict=True)),
            observed=dict(zip(self.terms.observed_names, means[1 + len(names) :], strict=True)),
            coefficients=dict(zip(names, self.terms.coefficients, strict=True)),
            lr=self.model.lr,
            grad_norm=self.model.grad_norm,
            loss_scale=self.model.loss_scale,
            skipped_steps=self.model.skipped_steps,
        )
        if window.bad_steps:
            self._report_bad(window, report)
        if not self.diverged:
            self.monitor.step(report)

    def _report_bad(self, window: WindowReport, report: StepReport) -> None:
        place = self._place(window.first_bad)
        assert place is not None
        self.skipped += window.bad_steps
        self.diverged = len(self.skipped) > self._may_skip
        skipped = None if self.diverged else len(self.skipped)
        self.monitor.report(
            failures.not_finite(report, place, window.bad_steps, skipped=skipped, may_skip=self._may_skip)
        )

    def check_weights(self, step: int) -> bool:
        """Returns whether all weights are finite, and reports it when not. The losses of a step are computed before its
        update, so they cannot tell. Under ZeRO-3 each rank looks at its own shards. Collective."""
        finite = self.model.is_finite()
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite.item():
            self.diverged = True
            self.monitor.report(failures.weights_not_finite(step))
        return not self.diverged

    def save(self, step: int, state: dict[str, Any], *, needed: bool) -> None:
        """Writes a checkpoint, unless the weights are not finite: then resume finds an older one. Collective.

        needed: this is the last chance, at the end or before a preemption. Raises RunFailure when it could not be
        written and is needed, or checkpoint.on_error says stop.
        """
        if self.checkpointer is None or not self.check_weights(step):
            return
        try:
            folder = self.checkpointer.save(self.model, step, {**self._kept, **state})
        except CheckpointFailed as error:
            goes_on = self.checkpointer.on_error == "continue" and not needed
            self.monitor.report(failures.checkpoint_failed(step, str(error), goes_on=goes_on))
            if not goes_on:
                raise RunFailure(
                    f"{error}. Earlier checkpoints are intact; fix that, and the same command continues from them"
                ) from None
            self.unsaved.add(step)
        else:
            self.monitor.checkpoint(step, folder)
