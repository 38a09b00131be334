"""The inner tensors of one forward pass that losses compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Features:
    """Tensors by layer index: hidden state 0 is the embedding output, k the output of layer k (HF `hidden_states[k]`);
    queries, keys and values exist for layers 1..N. Only the layers that were asked for are present."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer -> (B, L, D)"""
    query: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer -> (B, H, L, d_head)"""
    key: dict[int, torch.Tensor] = field(default_factory=dict)
    value: dict[int, torch.Tensor] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    """layer -> the factor on Q K^T (usually d_head ** -0.5)"""
    logits: torch.Tensor | None = None
    """(P, V) MLM logits of the P positions that were asked for, row-major over (B, L)."""
    task_logits: torch.Tensor | None = None
    """(B, labels) of a sequence classifier, (B, 1) of a regression, (B, L, 2) start and end of a span."""


@dataclass(frozen=True)
class Wanted:
    """What a forward pass must capture."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    """Layers whose query, key and value are captured."""
    values: bool = False
    """Whether `attention` includes the values (only the relation loss needs them)."""
    logits: bool = False
    task_logits: bool = False

    @property
    def whole(self) -> bool:
        """Whether the forward must run to its end, through the head."""
        return self.logits or self.task_logits

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(
            hidden=self.hidden | other.hidden,
            attention=self.attention | other.attention,
            values=self.values or other.values,
            logits=self.logits or other.logits,
            task_logits=self.task_logits or other.task_logits,
        )

    @property
    def deepest(self) -> int:
        """The last layer that has to run (0: only the embeddings)."""
        return max(self.hidden | self.attention, default=0)
