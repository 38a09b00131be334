"""One file per objective, and the registry of them."""

from __future__ import annotations

from engine.losses.attention import AttentionScoreLoss
from engine.losses.attention_probs import AttentionProbsLoss
from engine.losses.base import Loss
from engine.losses.cosine import CosineLoss
from engine.losses.embedding import EmbeddingLoss
from engine.losses.hidden import HiddenLoss
from engine.losses.logits import LogitsLoss
from engine.losses.mlm import MlmLoss
from engine.losses.relation import RelationLoss

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        HiddenLoss,
        AttentionScoreLoss,
        EmbeddingLoss,
        AttentionProbsLoss,
        RelationLoss,
        CosineLoss,
        LogitsLoss,
        MlmLoss,
    )
}
"""Name (engine.config.LOSS_NAMES) -> class, in the order in which terms are logged."""
