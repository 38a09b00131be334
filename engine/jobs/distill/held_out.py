"""The held-out losses of a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.data.batch import Counts
from engine.data.loader import CorpusLoader
from engine.ranks import watchdog
from engine.ranks.collectives import summed
from engine.train.trainee import Trainee
from engine.train.trainer import Teacher


@dataclass
class HeldOutLosses:
    """An Evaluation (engine/train/trainer.py) of one distillation: every `every` steps (0: never), before the first one
    and after the last."""

    trainee: Trainee
    teacher: Teacher
    loader: CorpusLoader
    every: int
    names: Sequence[str]
    """Names of the terms of a batch that is in no step."""
    enough: bool = False

    @property
    def at_start(self) -> bool:
        """Whether it is measured at all"""
        return bool(self.every)

    def due(self, step: int, *, last: bool) -> bool:
        """Returns whether to measure after `step`."""
        return bool(self.every) and (last or step % self.every == 0)

    def state(self) -> dict[str, Any]:
        """Returns nothing: held-out losses decide nothing."""
        return {}

    def __call__(self, step: int) -> bool:
        """Shows and records the held-out losses, which are the same whatever the ranks and batches. Collective."""
        model, device = self.trainee.model, self.trainee.runtime.device
        batches = list(self.loader.held_out_batches(self.trainee.execution.micro_batch_size))
        if not batches:
            return False
        local = sum((batch.counts for batch in batches), Counts())
        counts = local.with_values(summed(local.as_list()))
        count = len(self.names)
        sums = torch.zeros(count + 1, device=device)
        model.eval()
        with torch.no_grad():
            for batch in (cpu.to(device) for cpu in batches):
                total, terms = model(batch, self.teacher(batch), counts)
                sums += torch.cat([total.float().reshape(1), terms[:count]])
                watchdog.beat()
        model.train()
        if self.trainee.runtime.world_size > 1:
            torch.distributed.all_reduce(sums)
        total, *values = sums.tolist()
        self.trainee.monitor.held_out(step, total, dict(zip(self.names, values, strict=True)))
        return False
