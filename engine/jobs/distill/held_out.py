"""The held-out losses of a distillation, and what they decide: which step is exported, and an early end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine.config.distill import TrainConfig
from engine.data.batch import Counts
from engine.data.loader import CorpusLoader
from engine.jobs.distill.vectors import HeldOutVectors
from engine.models.pooling import MEAN
from engine.ranks import watchdog
from engine.ranks.collectives import summed
from engine.records.columns import counted
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.trainee import Trainee
from engine.train.trainer import Teacher

COMPARED = ("loss.", "data.")
"""Sections whose settings decide what a held-out loss is."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out losses after a step."""

    step: int
    total: float
    terms: dict[str, float]


@dataclass
class HeldOutLosses:
    """An Evaluation (engine/train/trainer.py) of one distillation: every train.eval_every steps (0: never), before the
    first one and after the last."""

    train: TrainConfig
    trainee: Trainee
    teacher: Teacher
    loader: CorpusLoader
    names: Sequence[str]
    """Names of the terms of a batch that is in no step."""
    pooled_layers: tuple[int, int] | None = None
    """Last layers of student and teacher, where vectors of texts are looked at too."""
    pooling: tuple[str, ...] = MEAN
    bad: int = 0
    """Evaluations in a row that were not better than the best one before by train.patience_threshold."""
    _warned: bool = False
    _better: list[HeldOut] = field(default_factory=list)
    """Those that were better than all before them."""

    @property
    def at_start(self) -> bool:
        """Whether it is measured at all"""
        return bool(self.train.eval_every)

    @property
    def enough(self) -> bool:
        """Whether train.patience has run out"""
        return self.train.patience is not None and self.bad >= self.train.patience

    @property
    def best(self) -> HeldOut | None:
        """The lowest of a step that has a checkpoint, or is about to have one; None without train.keep_best and
        train.patience"""
        saved = [one for one in self._better if one.step not in self.trainee.unsaved]
        return saved[-1] if saved else None

    def due(self, step: int, *, last: bool) -> bool:
        """Returns whether to measure after `step`."""
        return self.at_start and (last or step % self.train.eval_every == 0)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps; `keep_step` says to the Checkpointer which checkpoint must stay."""
        if self.best is None:
            return {}
        return {"held_out": asdict(self.best) | {"bad": self.bad}, "keep_step": self.best.step}

    def restore(self, state: dict[str, Any], checkpointer: Checkpointer, chosen: Chosen) -> None:
        """Continues from the state that a checkpoint holds, unless the best step has no checkpoint any more (a better
        one, from which the run has gone back, took its place), or its losses cannot be compared with new ones.
        Collective."""
        kept = state.get("held_out")
        others = any(change.startswith(COMPARED) for change in chosen.changes)
        if self.train.keeps_best and kept is not None and not others and checkpointer.has(kept["step"]):
            self._better, self.bad = [HeldOut(kept["step"], kept["total"], kept["terms"])], kept["bad"]

    def __call__(self, step: int) -> bool:
        """Shows and records the held-out losses, which are the same whatever the ranks and batches. Returns whether
        they are the best so far, where the best step is kept. Collective."""
        model, device = self.trainee.model, self.trainee.runtime.device
        batches = list(self.loader.held_out_batches(self.trainee.execution.micro_batch_size))
        if not batches:
            return False
        local = sum((batch.counts for batch in batches), Counts())
        counts = local.with_values(summed(local.as_list()))
        count = len(self.names)
        sums = torch.zeros(count + 1, device=device)
        vectors = None if self.pooled_layers is None else HeldOutVectors(*self.pooled_layers, self.pooling)
        model.eval()
        with torch.no_grad():
            for batch in (cpu.to(device) for cpu in batches):
                features = self.teacher(batch)
                if vectors is not None:
                    vectors.add(model, batch, features)
                total, terms = model(batch, features, counts)
                sums += torch.cat([total.float().reshape(1), terms[:count]])
                watchdog.beat()
        model.train()
        if self.trainee.runtime.world_size > 1:
            torch.distributed.all_reduce(sums)
        total, *values = sums.tolist()
        terms = dict(zip(self.names, values, strict=True))
        self.trainee.monitor.held_out(step, total, terms)
        if vectors is not None:
            self._show_rooms(step, vectors)
        return self.train.keeps_best and step > 0 and self._is_better(HeldOut(step, total, terms))

    def _show_rooms(self, step: int, vectors: HeldOutVectors) -> None:
        """Shows how much room the vectors of texts take; warns once of a student that has collapsed. Collective."""
        rooms = vectors.rooms()
        if rooms is None:
            return
        student, teacher = rooms
        monitor = self.trainee.monitor
        monitor.vectors(step, asdict(student), asdict(teacher))
        if step and not self._warned and student.is_collapsed_beside(teacher):
            self._warned = True
            monitor.say(
                "the student's vectors of different texts are much more alike than the teacher's: it has collapsed, or "
                "has not learnt enough yet. If it stays so, train longer, lower train.lr, or weigh similarity "
                "(loss.pooled_weights)"
            )

    def _is_better(self, new: HeldOut) -> bool:
        """Notes an evaluation of a step that can be exported; returns whether it is the best so far."""
        lowest = math.inf if self.best is None else self.best.total
        self.bad = 0 if new.total < lowest - self.train.patience_threshold else self.bad + 1
        if new.total < lowest:
            self._better.append(new)
        return new.total < lowest

    def describe_end(self, step: int) -> str | None:
        """Returns why the student is of the step that it is of, or None where that is the last one. step: of the
        end."""
        if not self.train.keeps_best:
            return None
        if self.best is None:
            return f"step {step} of {step}: there is no checkpoint with a held-out loss that can be compared"
        text = f"step {self.best.step} of {step}, the best by held-out loss ({self.best.total:.4g})"
        if step < self.train.steps:
            text += f"; stopped early: {counted(self.bad, 'evaluation')} without a better one (train.patience)"
        return text
