"""One file per objective, and the registry of them."""

from __future__ import annotations

from engine.losses.attention import AttentionScoreLoss
from engine.losses.attention_probs import AttentionProbsLoss
from engine.losses.base import Loss
from engine.losses.cosine import CosineLoss
from engine.losses.embedding import EmbeddingLoss
from engine.losses.hidden import HiddenLoss
from engine.losses.relation import RelationLoss
from engine.losses.vocabulary import VocabularyLosses

LOSSES: dict[str, type[Loss]] = {
    "hidden": HiddenLoss,
    "attention": AttentionScoreLoss,
    "embedding": EmbeddingLoss,
    "attention_probs": AttentionProbsLoss,
    "relation": RelationLoss,
    "cosine": CosineLoss,
    "logits": VocabularyLosses,
    "mlm": VocabularyLosses,
}
"""Name (engine.config.LOSS_NAMES) -> class, in the order in which terms are logged."""
