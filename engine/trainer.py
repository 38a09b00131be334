"""The training loop: generic over what is trained, free of host synchronisation between log steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from engine.checkpoint import Checkpointer
from engine.config import RunConfig
from engine.data.batch import Batch, Counts
from engine.data.loader import CorpusLoader, StepBatches
from engine.ds_config import Execution
from engine.monitor import Monitor, StepReport
from engine.runtime import Agreement, Runtime, StopRequest, seed_step
from engine.timing import PhaseTimer


class Outcome(Enum):
    DONE = "done"
    DIVERGED = "diverged"
    PREEMPTED = "preempted"


class Task(Protocol):
    """What is trained: its loss terms, and one forward pass."""

    term_names: Sequence[str]
    coefficients: Sequence[float]

    def forward(self, batch: Batch, per_micro: Counts, timer: PhaseTimer) -> tuple[torch.Tensor, torch.Tensor]:
        """The total (scalar, differentiable) and the raw terms (T,), normalised as DistilModule.forward says."""
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


@dataclass
class Trainer:
    config: RunConfig
    execution: Execution
    runtime: Runtime
    ds_engine: Any
    task: Task
    loader: CorpusLoader
    checkpointer: Checkpointer
    monitor: Monitor
    stop: StopRequest
    step: int = 0

    def __post_init__(self) -> None:
        self.timer = PhaseTimer(self.runtime.device)
        self.agreement = Agreement()
        self.window = LossWindow(len(self.task.term_names), self.runtime.device)
        self._interval_counts = Counts()
        self._grad_norm: torch.Tensor | float | None = None

    def train(self) -> Outcome:
        """Runs from `self.step` to train.steps; returns early when told to stop or when the loss is not finite."""
        train = self.config.train
        self.monitor.begin(self.step)
        batches = self.loader.steps(self.step)
        try:
            while self.step < train.steps:
                inputs = next(batches)
                stopping = self.train_step(inputs)
                last = self.step == train.steps or stopping
                saving = last or (train.save_every and self.step % train.save_every == 0)
                if (self.step % train.log_every == 0 or saving) and not self.log():
                    return Outcome.DIVERGED
                if train.eval_every and (self.step % train.eval_every == 0 or self.step == train.steps):
                    with self.monitor.pause():
                        self.evaluate()
                if saving and not self.save():
                    return Outcome.DIVERGED
                if stopping and self.step < train.steps:
                    return Outcome.PREEMPTED
        finally:
            batches.close()
        return Outcome.DONE

    def train_step(self, inputs: StepBatches) -> bool:
        """One optimizer step; returns whether any rank was told to stop before it."""
        counts, stopping = self.agreement.reduce(inputs.local_counts, self.stop.requested)
        self._interval_counts = self._interval_counts + counts
        per_micro = counts.scaled(1.0 / (self.runtime.world_size * self.execution.grad_accum_steps))
        seed_step(self.config.seed, self.step, self.runtime.rank)
        self.step += 1
        for i, batch in enumerate(inputs.micro, start=1):
            total, terms = self.task.forward(batch.to(self.runtime.device), per_micro, self.timer)
            last_micro = i == len(inputs.micro)
            with self.timer.phase("student"):
                self.ds_engine.backward(total)  # divides by accumulation itself
            with self.timer.phase("optimizer"):
                if last_micro and self.step % self.config.train.log_every == 0:
                    self._grad_norm = self._unreported_grad_norm()
                self.ds_engine.step()  # updates the weights on the last micro step only
            self.window.add(total, terms, step=self.step, last_micro=last_micro)
        return stopping

    def _unreported_grad_norm(self) -> torch.Tensor | None:
        """DeepSpeed keeps no gradient norm for plain fp32 data parallel, so it is taken before the step there."""
        if self.execution.zero_stage > 0 or self.execution.precision != "float32":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.ds_engine.module.parameters() if p.grad is not None])

    def log(self) -> bool:
        """Reports the interval; False when a loss was not finite."""
        means, first_bad = self.window.reduce(
            ranks=self.runtime.world_size, grad_accum_steps=self.execution.grad_accum_steps
        )
        norm = self._grad_norm if self._grad_norm is not None else self.ds_engine.get_global_grad_norm()
        report = StepReport(
            step=self.step,
            total=means[0],
            terms=dict(zip(self.task.term_names, means[1:], strict=True)),
            coefficients=dict(zip(self.task.term_names, self.task.coefficients, strict=True)),
            lr=float(self.ds_engine.get_lr()[0]),
            grad_norm=None if norm is None else float(norm),
            loss_scale=_loss_scale(self.ds_engine, self.execution.precision),
            skipped_steps=int(self.ds_engine.skipped_steps),
            counts=self._interval_counts,
            phases=self.timer.read(),
            wait_s=self.loader.wait_s,
        )
        self._interval_counts, self._grad_norm = Counts(), None
        if first_bad is None:
            self.monitor.step(report)
            return True
        self.monitor.diverged(report, first_bad)
        return False

    def evaluate(self) -> None:
        """Held-out losses on the fixed slice: exact means over it, whatever the ranks and batches."""
        batches = list(self.loader.evaluation(self.execution.micro_batch_size))
        if not batches:
            return
        local = sum((batch.counts for batch in batches), Counts())
        counts, _ = self.agreement.reduce(local, False)
        sums = torch.zeros(len(self.task.term_names) + 1, device=self.runtime.device)
        untimed = PhaseTimer(torch.device("cpu"))
        self.ds_engine.eval()
        with torch.no_grad():
            for batch in batches:
                total, terms = self.task.forward(batch.to(self.runtime.device), counts, untimed)
                sums += torch.cat([total.float().reshape(1), terms])
        self.ds_engine.train()
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(sums)
        values = sums.tolist()
        self.monitor.held_out(self.step, values[0], dict(zip(self.task.term_names, values[1:], strict=True)))

    def save(self) -> bool:
        """Writes a checkpoint, unless the weights are not finite: then it returns False, and resume finds an older one.

        The losses of a step are computed before its update, so they cannot tell.
        """
        with self.monitor.pause():
            if not self._weights_are_finite():
                self.monitor.diverged_weights(self.step)
                return False
            folder = self.checkpointer.save(self.ds_engine, self.step)
        self.monitor.checkpoint(self.step, folder)
        return True

    def _weights_are_finite(self) -> bool:
        """Collective. Under ZeRO-3 each rank looks at its own shards."""
        held = [getattr(p, "ds_tensor", p).detach() for p in self.ds_engine.module.parameters()]
        finite = torch.stack([torch.isfinite(tensor).all().to(self.runtime.device) for tensor in held]).all().float()
        if self.runtime.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        return bool(finite.item())


def _loss_scale(ds_engine: Any, precision: str) -> float | None:
    if precision != "float16":
        return None
    optimizer = ds_engine.optimizer
    return float(getattr(optimizer, "cur_scale", None) or optimizer.loss_scale)
