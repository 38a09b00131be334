"""Losses of hidden states and embedding outputs through the projection: MSE (TinyBERT, arXiv 1909.10351), cosine."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.kernels import reference
from engine.kernels.inputs import HiddenPairs
from engine.losses.base import Evaluated, HiddenMapped, Loss, LossSetup, Side, StepInputs, Target
from engine.models.features import Wanted
from engine.models.projections import EMBEDDINGS


def hidden_state_mse(
    loss: str,
    pairs: Mapping[str, tuple[int, int]],
    setup: LossSetup,
    inputs: StepInputs,
    weights: Mapping[str, float],
) -> Evaluated:
    """Returns means over real tokens, or over all positions in preset tinybert; pairs: term -> (student, teacher)
    hidden state."""
    with_pads = setup.counts_pads
    total = torch.zeros((), device=inputs.batch.input_ids.device)
    terms: dict[str, torch.Tensor] = {}
    for names in inputs.projections.sharing({name: student for name, (student, _) in pairs.items()}):
        states, targets = zip(*(inputs.hidden_states(loss, pairs[name]) for name in names), strict=True)
        compared = HiddenPairs(
            states,
            targets,
            coefficients=[weights[name] for name in names],
            tokens=inputs.per_micro.positions if with_pads else inputs.per_micro.tokens,
            mask=None if with_pads else inputs.rows.mask,
        )
        part, values = inputs.projections.mse(pairs[names[0]][0], inputs.kernels, compared)
        total = total + part
        terms |= zip(names, values.unbind(), strict=True)
    return Evaluated(total, terms)


class HiddenLoss(HiddenMapped):
    """MSE of hidden states through the projection (TinyBERT, arXiv 1909.10351)."""

    name = "hidden"

    @property
    def targets(self) -> dict[str, Target]:
        return {f"{self.name}/{pair}": Target("hidden", pair.teacher) for pair in self.pairs}

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        pairs = {f"{self.name}/{pair}": (pair.student, pair.teacher) for pair in self.pairs}
        return hidden_state_mse(self.name, pairs, self.setup, inputs, weights)


class CosineLoss(HiddenMapped):
    """1 - cosine of hidden states through the projection, always over real tokens."""

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


class EmbeddingLoss(Loss):
    """MSE of the embedding outputs (hidden state 0) through the projection (TinyBERT, arXiv 1909.10351)."""

    name = "embedding"

    @property
    def shares(self) -> dict[str, float]:
        return {self.name: 1.0}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(hidden=frozenset({EMBEDDINGS}))

    @property
    def targets(self) -> dict[str, Target]:
        return {self.name: Target("hidden", EMBEDDINGS)}

    @property
    def state_pairs(self) -> dict[str, tuple[int, int]]:
        return {self.name: (EMBEDDINGS, EMBEDDINGS)}

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        return hidden_state_mse(self.name, {self.name: (EMBEDDINGS, EMBEDDINGS)}, self.setup, inputs, weights)
