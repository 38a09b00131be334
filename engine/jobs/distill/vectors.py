"""How much room the vectors of held-out texts take, the student's beside the teacher's: a student whose vectors all
point one way has collapsed, and its loss need not show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import normalize

from engine.data.batch import Batch
from engine.losses.pooled import vectors_of
from engine.models.features import Features
from engine.ranks.collectives import gathered

MOST_TEXTS = 2048
"""Texts of each rank that are looked at."""
COLLAPSED_ANGLE = 0.5
"""Share of the teacher's 1 - mean cosine below which a student counts as collapsed. The quick start's students, which
learn, have .83 of it after 300 steps."""
COLLAPSED_RANK = 0.25
"""Share of the teacher's effective rank, likewise. It leaves room for narrow students, whose map adds no rank: the
quick start's, of half the teacher's width, have .51 of it."""


@dataclass(frozen=True)
class Room:
    """What the vectors of different texts share."""

    cosine: float
    """Mean over all pairs of texts."""
    rank: float
    """Effective rank of the vectors of length 1, without their mean: exp of the entropy of the singular values, as
    shares of their sum (Roy and Vetterli 2007)."""

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Room:
        """Returns that of (n, D) vectors, n > 1."""
        unit = normalize(vectors.double(), dim=1)
        count, total = len(unit), unit.sum(0)
        singular = torch.linalg.svdvals(unit - unit.mean(0))
        shares = singular[singular > 0] / singular.sum()
        rank = float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0
        return cls(float((total.square().sum() - unit.square().sum()) / (count * (count - 1))), rank)

    def is_collapsed_beside(self, teacher: Room) -> bool:
        return 1 - self.cosine < COLLAPSED_ANGLE * (1 - teacher.cosine) or self.rank < COLLAPSED_RANK * teacher.rank


@dataclass
class HeldOutVectors:
    """Vectors of the held-out texts, of student and teacher, as loss.pooled compares them: the student's through the
    projection, as its export makes them."""

    student_layers: int
    teacher_layers: int
    pooling: tuple[str, ...]
    _student: list[torch.Tensor] = field(default_factory=list)
    _teacher: list[torch.Tensor] = field(default_factory=list)

    def add(self, model: Any, batch: Batch, teacher: Features) -> None:
        """Takes the texts of a batch. model: a DistilModule, or DeepSpeed's engine around one."""
        if sum(map(len, self._student)) >= MOST_TEXTS:
            return
        [vectors] = model(batch, layers=frozenset([self.student_layers]), pooling=self.pooling)
        self._student.append(vectors.cpu())
        target = teacher.hidden[self.teacher_layers]
        self._teacher.append(vectors_of(target, teacher.segments, batch, self.pooling).cpu())

    def rooms(self) -> tuple[Room, Room] | None:
        """Returns the student's and the teacher's; None where a vector is not finite, or there are no two.
        Collective."""
        student, teacher = (
            torch.cat([share for shares in gathered(rows) for share in shares])
            for rows in (self._student, self._teacher)
        )
        if len(student) < 2 or not bool(torch.isfinite(student).all() and torch.isfinite(teacher).all()):
            return None
        return Room.of(student), Room.of(teacher)
