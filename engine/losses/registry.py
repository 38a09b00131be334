"""Every loss by its name in the configuration."""

from __future__ import annotations

from engine.losses.attention import AttentionProbsLoss, AttentionScoreLoss
from engine.losses.base import Loss
from engine.losses.hidden import CosineLoss, EmbeddingLoss, HiddenLoss
from engine.losses.pooled import PooledLoss
from engine.losses.relation import RelationLoss
from engine.losses.vocabulary import VocabularyLosses

LOSSES: dict[str, type[Loss]] = {
    "hidden": HiddenLoss,
    "attention": AttentionScoreLoss,
    "embedding": EmbeddingLoss,
    "attention_probs": AttentionProbsLoss,
    "relation": RelationLoss,
    "cosine": CosineLoss,
    "pooled": PooledLoss,
    "logits": VocabularyLosses,
    "mlm": VocabularyLosses,
}
"""Class of each name (engine.config.distill.LOSS_NAMES), in the order in which terms are logged."""
