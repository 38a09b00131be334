"""What the kernels are given: one tuple for attention, one for hidden states, one for MLM logits.

Names end in _s for the student and in _t for the teacher. Tensors are float16, bfloat16, float32 or float64, and the
two sides may differ in that. B sequences of L tokens, H heads of width d, hidden width D, vocabulary V, P chosen
positions; packed sequences, T tokens in all, are one row of T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.kernels.segments import Segments

UNSCORED_LABEL = -100
"""Label of a position that is not predicted; PyTorch's cross-entropy skips it by default."""


def normaliser(denominator: float) -> float:
    """Returns the denominator. Raises ValueError unless it is positive."""
    if denominator > 0:
        return denominator
    raise ValueError(f"a loss over real elements needs a positive count to divide by, got {denominator}")


def check_same_shape(what: str, student: torch.Size, teacher: torch.Size) -> None:
    """Raises ValueError for different sizes, which would broadcast into a number that means nothing."""
    if student != teacher:
        raise ValueError(f"{what} of student and teacher differ: {tuple(student)} and {tuple(teacher)}")


def repeat_heads(key: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns (B, heads, L, d) of grouped-query attention's (B, H_k, L, d); query head h uses key head
    h // (heads / H_k)."""
    if heads == key.shape[1]:
        return key
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[1]} key heads evenly")
    return key.repeat_interleave(heads // key.shape[1], dim=1)


class Rows(NamedTuple):
    """Which rows of a batch are real tokens: a mask over padded sequences, or packed sequences, with a mask where some
    of their pads were kept."""

    mask: torch.Tensor | None = None
    """Real tokens, (B, L) or (1, T) bool; None: all are"""
    segments: Segments | None = None
    """Places of packed sequences in (1, T, D) or (1, H, T, d); None: they are padded"""


class Attention(NamedTuple):
    """What a layer of each side computes its attention from. Both have the same B, H and L, and any head widths."""

    q_s: torch.Tensor
    """Student's queries, (B, H, L, d_s)"""
    k_s: torch.Tensor
    """Student's keys, (B, H or fewer, L, d_s)"""
    q_t: torch.Tensor
    """Teacher's queries, (B, H, L, d_t)"""
    k_t: torch.Tensor
    """Teacher's keys, (B, H or fewer, L, d_t)"""
    scale_s: float
    """Factor of the student's Q K^T"""
    scale_t: float
    """Factor of the teacher's Q K^T"""
    window_s: int | None = None
    """Tokens to each side that the student's layer attends to; None: all"""
    window_t: int | None = None
    """Tokens to each side that the teacher's layer attends to; None: all"""
    rows: Rows = Rows()

    @property
    def window(self) -> int | None:
        """Window of the pairs of tokens that both layers attend to"""
        return min((window for window in (self.window_s, self.window_t) if window is not None), default=None)

    def with_all_heads(self) -> Attention:
        """Returns the same with grouped keys repeated for each query head. Raises ValueError where B, H or L differ."""
        check_same_shape("(batch, heads, length)", self.q_s.shape[:3], self.q_t.shape[:3])
        heads = self.q_s.shape[1]
        return self._replace(k_s=repeat_heads(self.k_s, heads), k_t=repeat_heads(self.k_t, heads))

    def padded(self) -> Attention:
        """Returns the same in padded sequences."""
        segments = self.rows.segments
        if segments is None:
            return self
        return self.with_tensors((segments.padded(x, 2) for x in self[:4]), Rows(segments.mask_on(self.q_s.device)))

    def without_kept_pads(self) -> Attention:
        """Returns the same without the pads of packed sequences, for kernels that go through the sequences alone:
        gradients of kept pads would stay unwritten."""
        segments = self.rows.segments
        if segments is None:
            return self
        return self.with_tensors((x[:, :, : segments.tokens] for x in self[:4]), Rows(segments=segments))

    def with_tensors(self, tensors: Iterable[torch.Tensor], rows: Rows) -> Attention:
        """Returns the same with the four tensors laid out in another way, which `rows` describes."""
        q_s, k_s, q_t, k_t = tensors
        return self._replace(q_s=q_s, k_s=k_s, q_t=q_t, k_t=k_t, rows=rows)


def split_heads(x: torch.Tensor, relation_heads: int) -> torch.Tensor:
    """Returns the same features split anew: (B, H, L, d) -> (B, relation_heads, L, H * d / relation_heads)."""
    batch, heads, length, head_width = x.shape
    width = heads * head_width
    if width % relation_heads:
        raise ValueError(f"relation_heads={relation_heads} does not divide the width {width} of the captured tensor")
    return x.transpose(1, 2).reshape(batch, length, relation_heads, width // relation_heads).transpose(1, 2)


def relations(x_s: torch.Tensor, x_t: torch.Tensor, rows: Rows, *, relation_heads: int) -> Attention:
    """Returns what self-relations softmax(X X^T / sqrt(d_r)) are computed from: attention of each x (B, H, L, d), split
    anew into relation heads, to itself."""
    x_s, x_t = (split_heads(x, relation_heads) for x in (x_s, x_t))
    return Attention(x_s, x_s, x_t, x_t, x_s.shape[-1] ** -0.5, x_t.shape[-1] ** -0.5, rows=rows)


class HiddenPairs(NamedTuple):
    """Pairs of hidden states whose MSE is asked for, the student's through one linear map."""

    states: Sequence[torch.Tensor]
    """Student's hidden states, (B, L, D_s) each"""
    targets: Sequence[torch.Tensor]
    """Teacher's hidden states, (B, L, D_t) each"""
    coefficients: Sequence[float]
    """Weight of each pair in the sum that is differentiated"""
    tokens: float
    """Count that the loss is divided by"""
    mask: torch.Tensor | None = None
    """Real tokens, (B, L) bool; None: all are"""
    weight: torch.Tensor | None = None
    """Matrix of the linear map, (D_t, D_s) as in nn.Linear; None: the widths are equal"""
    bias: torch.Tensor | None = None
    """Bias of the linear map, (D_t,)"""

    def factor(self) -> float:
        """Returns 1 / (tokens * D_t). Raises ValueError for pairs that cannot be compared."""
        for state, target in zip(self.states, self.targets, strict=True):
            width = state.shape[-1] if self.weight is None else self.weight.shape[0]
            check_same_shape("hidden states", torch.Size([*state.shape[:-1], width]), target.shape)
        return 1.0 / normaliser(self.tokens * self.targets[0].shape[-1])


class Head(NamedTuple):
    """What turns hidden states into logits."""

    hidden: torch.Tensor
    """Inputs of the output matrix, (P, D), one row for each position that counts"""
    weight: torch.Tensor
    """Output matrix, (V, D)"""
    bias: torch.Tensor | None
    """Output bias, (V,)"""

    def logits(self, rows: slice) -> torch.Tensor:
        """Returns (rows, V), in the matrix's dtype."""
        return torch.nn.functional.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Weights:
    """Weights in the sum that is differentiated, and what each loss is divided by."""

    kl: float
    cross_entropy: float
    temperature: float
    count: float


class MlmLogits(NamedTuple):
    """What the losses over the vocabulary compare; a side is its head, or the logits (P, V) that a model made whole."""

    student: Head | torch.Tensor
    teacher: Head | torch.Tensor | None
    """Other side; None: no KL"""
    labels: torch.Tensor | None
    """Original tokens, (P,) int64; None: no cross-entropy"""
    weights: Weights
