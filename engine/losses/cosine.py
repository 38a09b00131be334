"""1 - cosine of hidden states through the projection, always over real tokens."""

from __future__ import annotations

import torch

from engine.kernels import reference
from engine.losses.base import HiddenMapped, StepInputs


class CosineLoss(HiddenMapped):
    name = "cosine"

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        terms = {}
        for pair in self.pairs:
            student, teacher = inputs.hidden_states(self.name, (pair.student, pair.teacher))
            terms[f"{self.name}/{pair}"] = reference.hidden_cosine(
                student, teacher, inputs.batch.token_mask, inputs.per_micro.tokens
            )
        return terms
