"""MSE of hidden states through the projection (TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

import torch

from engine.kernels.hidden_mse import hidden_mse
from engine.losses.base import HiddenMapped, LossSetup, StepInputs


def hidden_state_mse(loss: str, pair: tuple[int, int], setup: LossSetup, inputs: StepInputs) -> torch.Tensor:
    """Mean over real tokens, or over all positions in preset tinybert; pair = (student, teacher) hidden state."""
    student, teacher = inputs.hidden_states(loss, pair, with_pads=setup.counts_pads)
    if setup.counts_pads:
        return hidden_mse(student, teacher, None, inputs.per_micro.positions)
    return hidden_mse(student, teacher, inputs.batch.token_mask, inputs.per_micro.tokens)


class HiddenLoss(HiddenMapped):
    name = "hidden"

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        return {
            f"{self.name}/{pair}": hidden_state_mse(self.name, (pair.student, pair.teacher), self.setup, inputs)
            for pair in self.pairs
        }
