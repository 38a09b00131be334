"""Encoders that compute their attention themselves, without transformers' attention interface: what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Projections(NamedTuple):
    """The linear maps of a layer that make its queries, keys and values, in this order of calls."""

    query: str
    key: str
    value: str
    added: str
    """What the scores of this model type have beside scaling * Q K^T"""


PROJECTIONS = {
    "mpnet": Projections(
        "attention.attn.q", "attention.attn.k", "attention.attn.v", "a bias for each head and distance"
    ),
    "deberta-v2": Projections(
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "the products of content and relative position (c2p, p2c)",
    ),
}
"""Projections by model type; for others hidden states and logits are all that is captured."""


@dataclass(frozen=True)
class OwnAttention:
    """What is known of the attention of one model that computes it itself."""

    model_type: str
    projections: Projections | None
    heads: int
    terms: int
    """Number of terms of a score, of which Q K^T is one; scores are divided by sqrt(d_head * terms)"""
    added: str
    """What the scores have beside scaling * Q K^T; empty: nothing, or not known"""

    def modules(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Returns the modules of a layer that make queries, keys and values. Only where they are known."""
        assert self.projections is not None
        query, key, value = (layer.get_submodule(path) for path in self.projections[:3])
        return query, key, value

    def scaling(self, query: torch.Tensor) -> float:
        """Returns the factor on Q K^T for queries (B, H, L, d)."""
        return float(query.shape[-1] * self.terms) ** -0.5


def own_attention(model_class: type[PreTrainedModel], config: PretrainedConfig) -> OwnAttention | None:
    """Returns what is known of the attention that a model computes itself; None for one that goes through transformers'
    attention interface."""
    if model_class._can_set_attn_implementation():
        return None
    projections = PROJECTIONS.get(config.model_type)
    position_terms = getattr(config, "pos_att_type", None) or ()
    is_relative = projections is not None and getattr(config, "relative_attention", True)
    return OwnAttention(
        config.model_type,
        projections,
        heads=config.num_attention_heads,
        terms=1 + sum(term in position_terms for term in ("c2p", "p2c")),
        added=projections.added if projections is not None and is_relative else "",
    )
