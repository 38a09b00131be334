"""KL of Q-Q, K-K and V-V relations (MiniLMv2, arXiv 2012.15828), always over real tokens; any head counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from engine.errors import UserError
from engine.kernels.inputs import relations, repeat_heads
from engine.losses.base import AttentionMapped, Evaluated, Pair, Side, StepInputs
from engine.models.features import Wanted

KINDS = (("qq", "query"), ("kk", "key"), ("vv", "value"))
"""Names in the log, and in Features; in the order of loss.relation_weights."""


class RelationLoss(AttentionMapped):
    name = "relation"

    @property
    def relation_heads(self) -> int:
        return self.setup.config.relation_heads or self.setup.teacher.heads

    def check(self) -> None:
        super().check()
        heads, student, teacher = self.relation_heads, self.setup.student.width, self.setup.teacher.width
        if student % heads == 0 and teacher % heads == 0:
            return
        common = math.gcd(student, teacher)
        divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        origin = "" if self.setup.config.relation_heads else " (unset: the teacher's number of heads)"
        raise UserError(
            f"loss.relation_heads={heads}{origin} must divide both widths, the student's {student} and the teacher's "
            f"{teacher}: choose one of {divisors}"
        )

    @property
    def _active(self) -> tuple[tuple[str, str, float], ...]:
        weighted = zip(KINDS, self.setup.config.relation_weights, strict=True)
        return tuple((short, kind, weight) for (short, kind), weight in weighted if weight > 0)

    @property
    def shares(self) -> dict[str, float]:
        return {
            f"{self.name}/{short}/{pair}": weight * pair.share
            for short, _, weight in self._active
            for pair in self.pairs
        }

    def wanted(self, side: Side) -> Wanted:
        layers = frozenset(pair.layer(side) for pair in self.pairs)
        return Wanted(attention=layers, values=any(kind == "value" for _, kind, _ in self._active))

    def _side(self, inputs: StepInputs, side: Side, kind: str, pair: Pair) -> torch.Tensor:
        """Returns (B, H, L, d). Grouped keys and values are repeated for each query head, so that they have the full
        width that relation_heads divides."""
        tensor = inputs.captured(self.name, side, kind, pair.layer(side))
        return repeat_heads(tensor, getattr(self.setup, side).heads)

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values = {
            f"{self.name}/{short}/{pair}": inputs.kernels.softmax_kl(
                relations(
                    self._side(inputs, "student", kind, pair),
                    self._side(inputs, "teacher", kind, pair),
                    inputs.rows,
                    relation_heads=self.relation_heads,
                ),
                tokens=inputs.per_micro.tokens,
            )
            for short, kind, _ in self._active
            for pair in self.pairs
        }
        return Evaluated.weighted(values, weights)
