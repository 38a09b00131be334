"""The training loop: one teacher pass, then a micro step of every model in training. Distillation and fine-tuning train
one, a proxy cohort several. No host synchronisation between log steps."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from engine.config.distill import TrainConfig
from engine.data.batch import Batch
from engine.data.loader import StepBatches
from engine.errors import Diverged, Preempted, RunFailure, first_line, is_out_of_memory
from engine.models.features import Features
from engine.ranks import watchdog
from engine.ranks.collectives import summed
from engine.ranks.runtime import Runtime, StopRequest, seed_micro_step
from engine.train import failures
from engine.train.failures import MOST_SEQUENCES
from engine.train.step_report import Interval, IntervalMeter
from engine.train.trainee import MicroStep, Trainee

Teacher = Callable[[Batch], Features]


class Outcome(Enum):
    """How training ended."""

    DONE = "done"
    DIVERGED = "diverged"
    PREEMPTED = "preempted"

    def require_done(self, folder: Path) -> None:
        """Raises Diverged or Preempted for the job of this folder, which has said so, unless it is done."""
        if self is Outcome.DIVERGED:
            raise Diverged(f"{folder}: the losses or weights were not finite; its records say where")
        if self is Outcome.PREEMPTED:
            raise Preempted(f"{folder}: stopped, and saved; the same call continues")


class BatchSource(Protocol):
    """CorpusLoader or TaskLoader."""

    wait_s: float
    """Seconds that this rank has waited for data since the start."""

    def steps(self, start: int) -> Generator[StepBatches, None, None]:
        """Yields the micro batches of each step from `start` on, counted from 0."""
        ...

    def sequence_ids(self, step: int, micro: int, rank: int) -> list[int]:
        """Returns the numbers (in the corpus or data set) of what `rank` trains on in micro step `micro` of `step`, all
        from 0."""
        ...


class Evaluation(Protocol):
    """A measurement between steps. It is called on every rank, and decides the same on all of them."""

    @property
    def at_start(self) -> bool:
        """Whether a new model is measured before its first step, too"""
        ...

    @property
    def enough(self) -> bool:
        """Whether training should end before its last step"""
        ...

    def due(self, step: int, *, last: bool) -> bool:
        """Returns whether to measure after `step`. last: it is the last step of the run."""
        ...

    def __call__(self, step: int) -> bool:
        """Measures, and returns whether a checkpoint of this step is worth keeping. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run must know; a checkpoint keeps it."""
        ...


@dataclass
class Trainer:
    """The loop of one start, over the models that are trained side by side."""

    train: TrainConfig
    seed: int
    runtime: Runtime
    stop: StopRequest
    trainees: Sequence[Trainee]
    """Models in training, which are executed the same way."""
    teacher: Teacher | None
    loader: BatchSource
    evaluation: Evaluation | None = None
    step: int = 0
    """Last step that is done, from 1; 0 before the first."""

    def __post_init__(self) -> None:
        self._meter = IntervalMeter(self.runtime.device)
        self._in_micro_step: tuple[int, Batch] | None = None
        """Number of the current micro step within its step, and its batch; None between steps."""

    @property
    def live(self) -> list[Trainee]:
        """Models that have neither diverged nor been stopped"""
        return [trainee for trainee in self.trainees if not trainee.diverged and not trainee.stopped]

    def run(self) -> Outcome:
        """Runs from `self.step` to train.steps; returns early when told to stop, when the evaluation has seen enough,
        or when no model is left in training."""
        for trainee in self.trainees:
            trainee.monitor.begin(self.step)
        watch = self.trainees[0].monitor.watch_hangs(
            f"step-{self.step:08d}",
            step=lambda: self.step,
            rank=self.runtime.rank,
            limit_s=self.train.hang_timeout_s,
        )
        with watch, self._explain_out_of_memory():
            if self.step == 0 and self.evaluation is not None and self.evaluation.at_start:
                with self._pause():
                    self.evaluation(0)
            return self._loop()

    def _loop(self) -> Outcome:
        batches = self.loader.steps(self.step)
        try:
            while self.step < self.train.steps and not self._seen_enough():
                stopping = self.train_step(next(batches))
                last = self.step == self.train.steps
                saving = last or stopping or bool(self.train.save_every and self.step % self.train.save_every == 0)
                evaluating = self.evaluation is not None and self.evaluation.due(self.step, last=last)
                if self.step % self.train.log_every == 0 or saving or evaluating:  # losses are looked at first
                    self.log()
                if self.evaluation is not None and evaluating and self.live:
                    with self._pause():
                        watchdog.beat()
                        saving |= self.evaluation(self.step)
                        watchdog.beat()
                if saving or self._seen_enough():
                    self.save(needed=last or stopping or self._seen_enough())
                if not self.live:
                    return Outcome.DIVERGED if all(trainee.diverged for trainee in self.trainees) else Outcome.DONE
                if stopping and not last and not self._seen_enough():
                    return Outcome.PREEMPTED
        finally:
            batches.close()
        return Outcome.DONE

    def _seen_enough(self) -> bool:
        return self.evaluation is not None and self.evaluation.enough

    def _pause(self) -> ExitStack:
        """Leaves the time that is spent inside out of the time of training, for every model."""
        stack = ExitStack()
        for trainee in self.trainees:
            stack.enter_context(trainee.monitor.pause())
        return stack

    def train_step(self, inputs: StepBatches) -> bool:
        """Makes one optimizer step of every model; returns whether any rank was told to stop before it. Collective."""
        *sums, stops = summed([*inputs.local_counts.as_list(), self.stop.requested])
        counts, stopping = inputs.local_counts.with_values(sums), stops > 0
        self._meter.add(counts)
        live = self.live
        per_micro = counts.scaled(1.0 / (self.runtime.world_size * len(inputs.micro)))
        self.step += 1
        for i, micro in enumerate(inputs.micro):
            self._in_micro_step = i, micro
            at = MicroStep(self.step, i, logged=self.step % self.train.log_every == 0)
            batch = micro.to(self.runtime.device)
            features = None
            if self.teacher is not None:
                with self._meter.phase("teacher"):
                    features = self.teacher(batch)
            for trainee in live:
                # the same dropout alone and in a cohort
                seed_micro_step(self.seed, self.step, i + 1, self.runtime.rank)
                trainee.micro_step(batch, features, per_micro, at, last_user=trainee is live[-1], meter=self._meter)
            watchdog.beat()
        self._in_micro_step = None
        return stopping

    def log(self) -> None:
        """Reports the interval of every model; one whose loss was not finite drops out. Collective."""
        measures = self._meter.read()
        for trainee in self.live:
            trainee.log(Interval(self.step, measures.counts, measures.phases_of(trainee), self.loader.wait_s))

    def save(self, *, needed: bool) -> None:
        """Writes a checkpoint of every model. needed: there will be no later one in this start. Collective. Raises
        RunFailure as Trainee.save does."""
        state = {} if self.evaluation is None else self.evaluation.state()
        with self._pause():
            for trainee in self.live:
                watchdog.beat()
                trainee.save(self.step, state, needed=needed)
                watchdog.beat()

    @contextmanager
    def _explain_out_of_memory(self) -> Iterator[None]:
        """Turns an error of memory that runs out inside into a record of what did not fit, and a RunFailure."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error) or isinstance(error, RunFailure):
                raise
            rank, why = self.runtime.rank, first_line(error)[:200]
            where, facts = f"after step {self.step}", {}
            if self._in_micro_step is not None:
                micro, batch = self._in_micro_step
                shape, sequences = list(batch.input_ids.shape), self.loader.sequence_ids(self.step - 1, micro, rank)
                where = f"in step {self.step}"
                facts = {"micro": micro, "shape": shape, "sequences": sequences[:MOST_SEQUENCES]}
            self.trainees[0].monitor.record_from_any_rank(
                failures.out_of_memory(self.step, rank=rank, why=why, **facts)
            )
            batch_size = self.trainees[0].execution.micro_batch_size
            raise RunFailure(
                f"out of memory {where} on rank {rank} ({platform.node()}), at micro batches of "
                f"{batch_size} sequences ({why}). A smaller train_micro_batch_size_per_gpu, "
                "student.activation_checkpointing, ZeRO or offload need less; checkpoints are intact, and "
                "the micro batch may change at resume"
            ) from None
