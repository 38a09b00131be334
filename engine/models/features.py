"""The inner tensors of one forward pass that losses compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.kernels.segments import Segments
from engine.models.mlm_head import MlmHead, WholeLogits


@dataclass
class Features:
    """Tensors by layer index: hidden state 0 is the embedding output, k the output of layer k (HF `hidden_states[k]`);
    queries, keys and values exist for layers 1..N. Only the layers that were asked for are present."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer -> (B, L, D)"""
    query: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer -> (B, H, L, d_head), as are key and value"""
    key: dict[int, torch.Tensor] = field(default_factory=dict)
    value: dict[int, torch.Tensor] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    """layer -> the factor on Q K^T (usually d_head ** -0.5)"""
    mlm_head: MlmHead | WholeLogits | None = None
    """What makes the MLM logits of the P positions that were asked for, row-major over (B, L)."""
    segments: Segments | None = None
    """Set when the batch ran without its pads: hidden states are (1, T, D) then, queries, keys and values (1, H, T, d),
    T its `rows`."""
    task_logits: torch.Tensor | None = None
    """(B, labels) of a sequence classifier, (B, 1) of a regression, (B, L, 2) start and end of a span."""

    def release(self) -> None:
        """Lets go of the tensors; losses keep what their gradients need."""
        for tensors in (self.hidden, self.query, self.key, self.value):
            tensors.clear()
        self.mlm_head = self.task_logits = None

    @property
    def logits(self) -> torch.Tensor | None:
        """Logits of the positions that were asked for, (P, V)."""
        return None if self.mlm_head is None else self.mlm_head.logits()


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
    def last_attention(self) -> int | None:
        """The last layer that has to run, if it need not run beyond its queries, keys and values."""
        deepest = self.deepest
        return deepest if deepest > 0 and deepest not in self.hidden and not self.whole else None

    @property
    def deepest(self) -> int:
        """The last layer that has to run (0: only the embeddings)."""
        return max(self.hidden | self.attention, default=0)
