"""MSE of the embedding outputs (hidden state 0) through the projection (TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

from collections.abc import Mapping

from engine.losses.base import Evaluated, Loss, Side, StepInputs
from engine.losses.hidden import hidden_state_mse
from engine.models.features import Wanted
from engine.models.projections import EMBEDDINGS


class EmbeddingLoss(Loss):
    name = "embedding"

    @property
    def shares(self) -> dict[str, float]:
        return {self.name: 1.0}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(hidden=frozenset({EMBEDDINGS}))

    @property
    def projected_layers(self) -> frozenset[int]:
        return frozenset({EMBEDDINGS})

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        return hidden_state_mse(self.name, {self.name: (EMBEDDINGS, EMBEDDINGS)}, self.setup, inputs, weights)
