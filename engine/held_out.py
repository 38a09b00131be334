"""Held-out losses: exact means over the slice of the corpus that is never trained on."""

from __future__ import annotations

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
    """An Evaluation (engine/train/trainer.py) of one distillation, every `every` steps (0: never) and at the end."""

    trainee: Trainee
    teacher: Teacher
    loader: CorpusLoader
    every: int
    enough: bool = False

    def due(self, step: int, *, last: bool) -> bool:
        return bool(self.every) and (last or step % self.every == 0)

    def state(self) -> dict[str, Any]:
        return {}

    def __call__(self, step: int) -> bool:
        """The same whatever the ranks and batches. Collective."""
        ds_engine, device = self.trainee.ds_engine, self.trainee.runtime.device
        batches = list(self.loader.evaluation(self.trainee.execution.micro_batch_size))
        if not batches:
            return False
        counts = Counts(*summed(sum((batch.counts for batch in batches), Counts()).as_list()))
        count = len(self.trainee.term_names)
        sums = torch.zeros(count + 1, device=device)
        ds_engine.eval()
        with torch.no_grad():
            for batch in (cpu.to(device) for cpu in batches):
                total, terms = ds_engine(batch, self.teacher(batch), counts)
                sums += torch.cat([total.float().reshape(1), terms[:count]])
                watchdog.beat()
        ds_engine.train()
        if self.trainee.runtime.world_size > 1:
            torch.distributed.all_reduce(sums)
        total, *values = sums.tolist()
        self.trainee.monitor.held_out(step, total, dict(zip(self.trainee.term_names, values, strict=True)))
        return False
