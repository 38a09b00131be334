"""The training loop: one teacher pass, then a micro step of every model in training. Distillation and fine-tuning train
one, a proxy cohort several. No host synchronisation between log steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import torch

from engine.checkpoint import Checkpointer
from engine.config import TrainConfig
from engine.data.batch import Batch, Counts
from engine.data.loader import StepBatches
from engine.ds_config import Execution
from engine.exit_codes import EXIT_DIVERGED, EXIT_DONE, EXIT_PREEMPTED
from engine.models.features import Features
from engine.monitor import Interval, Monitor, StepReport
from engine.runtime import Agreement, Runtime, StopRequest, seed_micro_step
from engine.timing import PhaseTimer

Teacher = Callable[[Batch], Features]


class Outcome(Enum):
    DONE = "done"
    DIVERGED = "diverged"
    PREEMPTED = "preempted"

    @property
    def exit_code(self) -> int:
        return {Outcome.DONE: EXIT_DONE, Outcome.DIVERGED: EXIT_DIVERGED, Outcome.PREEMPTED: EXIT_PREEMPTED}[self]


class BatchSource(Protocol):
    """CorpusLoader or TaskLoader."""

    wait_s: float

    def steps(self, start: int) -> Iterator[StepBatches]: ...


class Evaluation(Protocol):
    """What is measured between steps. Called on every rank, and decides the same on all of them."""

    @property
    def enough(self) -> bool:
        """Whether training should end before its last step."""
        ...

    def due(self, step: int, *, last: bool) -> bool: ...

    def __call__(self, step: int) -> bool:
        """Measures; returns whether a checkpoint of this step is worth keeping."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run must know; a checkpoint keeps it."""
        ...


class LossWindow:
    """Sums total and terms since the last log step, on the device; remembers the first step that was not finite."""

    def __init__(self, terms: int, device: torch.device) -> None:
        self._sums = torch.zeros(terms + 1, device=device)
        self._first_bad = torch.full((), -1.0, device=device)
        self._steps = 0

    def add(self, total: torch.Tensor, terms: torch.Tensor, *, step: int, last_micro: bool) -> None:
        values = torch.cat([total.detach().float().reshape(1), terms])
        self._sums += values
        bad = ~torch.isfinite(values).all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, float(step), self._first_bad)
        self._steps += last_micro

    def reduce(self, *, ranks: int, grad_accum_steps: int) -> tuple[list[float], int | None]:
        """Collective; waits for the device. Means over the window of [total, *terms] over all ranks, and the first
        step with a non-finite value, if any. Starts a new window."""
        far = torch.where(self._first_bad < 0, torch.inf, self._first_bad)
        if ranks > 1:
            torch.distributed.all_reduce(self._sums)
            torch.distributed.all_reduce(far, op=torch.distributed.ReduceOp.MIN)
        means = (self._sums / (ranks * grad_accum_steps * max(self._steps, 1))).tolist()
        first = far.item()
        self._sums.zero_()
        self._first_bad.fill_(-1.0)
        self._steps = 0
        return means, None if math.isinf(first) else int(first)


class Trainee:
    """One model in training: its engine, and what is seen and kept of it.

    ds_engine: around a module whose forward(batch, teacher features, per_micro) returns the total (scalar,
    differentiable) and the raw terms (T,), then what is observed (O,), normalised as DistilModule.forward says.
    """

    def __init__(
        self,
        ds_engine: Any,
        *,
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
        self._timer = PhaseTimer(runtime.device)
        self._window = LossWindow(len(self.term_names) + len(self.observed_names), runtime.device)
        self._grad_norm: torch.Tensor | float | None = None

    def micro_step(
        self,
        batch: Batch,
        features: Features | None,
        per_micro: Counts,
        *,
        last_user: bool,
        step: int,
        last_micro: bool,
        logged: bool,
    ) -> None:
        """One forward and backward; the last micro step of a step also updates the weights. last_user: nobody else
        needs the features, so their memory may serve the backward pass."""
        with self._timer.phase("student"):
            total, terms = self.ds_engine(batch, features, per_micro)
            if features is not None and last_user:
                features.release()
            self.ds_engine.backward(total)  # divides by accumulation itself
        with self._timer.phase("optimizer"):
            if last_micro and logged:
                self._grad_norm = self._unreported_grad_norm()
            self._step(step)
        self._window.add(total, terms, step=step, last_micro=last_micro)

    def _step(self, step: int) -> None:
        try:
            self.ds_engine.step()  # updates the weights on the last micro step only
        except Exception as error:  # DeepSpeed has no class for it; every rank raises it in the same step
            if "loss scale already at minimum" not in str(error):
                raise
            self.diverged = True
            self.monitor.diverged_scale(step)

    def _unreported_grad_norm(self) -> torch.Tensor | None:
        """DeepSpeed keeps no gradient norm for plain fp32 data parallel, so it is taken before the step there."""
        if self.execution.zero_stage > 0 or self.execution.precision != "float32":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.ds_engine.module.parameters() if p.grad is not None])

    def log(self, interval: Interval) -> None:
        """Reports the interval, or that a loss was not finite."""
        means, first_bad = self._window.reduce(
            ranks=self.runtime.world_size, grad_accum_steps=self.execution.grad_accum_steps
        )
        interval = replace(interval, phases={**interval.phases, **self._timer.read()})
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
        if first_bad is None:
            self.monitor.step(report)
        else:
            self.diverged = True
            self.monitor.diverged(report, first_bad)

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

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, unless the weights are not finite: then resume finds an older one."""
        if self.checkpointer is None or not self.check_weights(step):
            return
        self.monitor.checkpoint(step, self.checkpointer.save(self.ds_engine, step, state))


@dataclass
class Trainer:
    train: TrainConfig
    seed: int
    execution: Execution
    runtime: Runtime
    agreement: Agreement
    stop: StopRequest
    trainees: Sequence[Trainee]
    teacher: Teacher | None
    loader: BatchSource
    evaluation: Evaluation | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self._timer = PhaseTimer(self.runtime.device)
        self._interval_counts = Counts()

    @property
    def live(self) -> list[Trainee]:
        """Those that have neither diverged nor been stopped."""
        return [trainee for trainee in self.trainees if not trainee.diverged and not trainee.stopped]

    def run(self) -> Outcome:
        """Runs from `self.step` to train.steps; returns early when told to stop, when the evaluation has seen enough,
        or when no model is left in training."""
        for trainee in self.trainees:
            trainee.monitor.begin(self.step)
        batches = self.loader.steps(self.step)
        try:
            while self.step < self.train.steps and not self._seen_enough():
                stopping = self.train_step(next(batches))
                last = self.step == self.train.steps
                saving = last or stopping or bool(self.train.save_every and self.step % self.train.save_every == 0)
                if self.step % self.train.log_every == 0 or saving:
                    self.log()
                if self.evaluation is not None and self.live and self.evaluation.due(self.step, last=last):
                    with self._pause():
                        saving |= self.evaluation(self.step)
                if saving or self._seen_enough():
                    self.save()
                if not self.live:
                    return Outcome.DIVERGED if all(one.diverged for one in self.trainees) else Outcome.DONE
                if stopping and not last and not self._seen_enough():
                    return Outcome.PREEMPTED
        finally:
            batches.close()
        return Outcome.DONE

    def _seen_enough(self) -> bool:
        return self.evaluation is not None and self.evaluation.enough

    def _pause(self) -> ExitStack:
        """Time spent inside does not count as training time."""
        stack = ExitStack()
        for trainee in self.trainees:
            stack.enter_context(trainee.monitor.pause())
        return stack

    def train_step(self, inputs: StepBatches) -> bool:
        """One optimizer step of every model; returns whether any rank was told to stop before it."""
        counts, stopping = self.agreement.reduce(inputs.local_counts, self.stop.requested)
        self._interval_counts = self._interval_counts + counts
        per_micro = counts.scaled(1.0 / (self.runtime.world_size * self.execution.grad_accum_steps))
        live = self.live
        self.step += 1
        for i, micro in enumerate(inputs.micro, start=1):
            batch = micro.to(self.runtime.device)
            features = None
            if self.teacher is not None:
                with self._timer.phase("teacher"):
                    features = self.teacher(batch)
            for trainee in live:
                seed_micro_step(self.seed, self.step, i, self.runtime.rank)  # the same dropout alone and in a cohort
                trainee.micro_step(
                    batch,
                    features,
                    per_micro,
                    last_user=trainee is live[-1],
                    step=self.step,
                    last_micro=i == len(inputs.micro),
                    logged=self.step % self.train.log_every == 0,
                )
        return stopping

    def log(self) -> None:
        """Reports the interval of every model; one whose loss was not finite drops out."""
        interval = Interval(
            step=self.step, counts=self._interval_counts, phases=self._timer.read(), wait_s=self.loader.wait_s
        )
        self._interval_counts = Counts()
        for trainee in self.live:
            trainee.log(interval)

    def save(self) -> None:
        state = {} if self.evaluation is None else self.evaluation.state()
        with self._pause():
            for trainee in self.live:
                trainee.save(self.step, state)


def _loss_scale(ds_engine: Any, precision: str) -> float | None:
    if precision != "float16":
        return None
    optimizer = ds_engine.optimizer
    return float(getattr(optimizer, "cur_scale", None) or optimizer.loss_scale)
