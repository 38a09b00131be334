"""1 - cosine of hidden states through the projection, always over real tokens."""

from __future__ import annotations

from collections.abc import Mapping

from engine.kernels import reference
from engine.losses.base import Evaluated, HiddenMapped, StepInputs


class CosineLoss(HiddenMapped):
    name = "cosine"

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values = {}
        for pair in self.pairs:
            _, teacher = inputs.hidden_states(self.name, (pair.student, pair.teacher))
            student = inputs.projected(self.name, pair.student)
            values[f"{self.name}/{pair}"] = reference.hidden_cosine(
                student, teacher, inputs.rows.mask, inputs.per_micro.tokens
            )
        return Evaluated.weighted(values, weights)
