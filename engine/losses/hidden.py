"""MSE of hidden states through the projection (TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.kernels.choice import Rows
from engine.losses.base import Evaluated, HiddenMapped, LossSetup, StepInputs


def hidden_state_mse(
    loss: str,
    pairs: Mapping[str, tuple[int, int]],
    setup: LossSetup,
    inputs: StepInputs,
    weights: Mapping[str, float],
) -> Evaluated:
    """Mean over real tokens, or over all positions in preset tinybert; pairs: term -> (student, teacher) hidden
    state."""
    with_pads = setup.counts_pads
    total = torch.zeros((), device=inputs.batch.input_ids.device)
    terms: dict[str, torch.Tensor] = {}
    for names in inputs.projections.sharing({name: student for name, (student, _) in pairs.items()}):
        states, targets = zip(*(inputs.hidden_states(loss, pairs[name]) for name in names), strict=True)
        part, values = inputs.projections.mse(
            pairs[names[0]][0],
            inputs.kernels,
            states,
            targets,
            Rows() if with_pads else inputs.rows,
            tokens=inputs.per_micro.positions if with_pads else inputs.per_micro.tokens,
            coefficients=[weights[name] for name in names],
        )
        total = total + part
        terms |= zip(names, values.unbind(), strict=True)
    return Evaluated(total, terms)


class HiddenLoss(HiddenMapped):
    name = "hidden"

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        pairs = {f"{self.name}/{pair}": (pair.student, pair.teacher) for pair in self.pairs}
        return hidden_state_mse(self.name, pairs, self.setup, inputs, weights)
