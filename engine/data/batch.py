"""The batch that loader, models and losses share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Counts:
    """What the losses are normalised by, summed over some sequences. Plain numbers: no device is asked for them."""

    sequences: float = 0
    tokens: float = 0
    """Real (not padded) tokens, special tokens included."""
    token_pairs: float = 0
    """Sum over sequences of (real tokens) squared: the entries of the attention maps that count."""
    positions: float = 0
    """B * L, pads included (TinyBERT's means)."""
    position_pairs: float = 0
    """B * L * L, pads included."""
    masked: float = 0
    """Positions with an MLM label."""

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], *, masked: int = 0) -> Counts:
        """Of one micro batch whose rows have `lengths` (B,) real tokens and are padded to the longest."""
        positions, longest = len(lengths) * int(lengths.max()), int(lengths.max())
        return cls(
            sequences=len(lengths),
            tokens=int(lengths.sum()),
            token_pairs=int((lengths**2).sum()),
            positions=positions,
            position_pairs=positions * longest,
            masked=masked,
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> Counts:
        return Counts(*(getattr(self, f.name) * factor for f in fields(self)))

    def as_list(self) -> list[float]:
        return [float(getattr(self, f.name)) for f in fields(self)]


@dataclass(frozen=True)
class Batch:
    """One micro batch of B sequences of L tokens."""

    input_ids: torch.Tensor
    """(B, L) int64, already masked when MLM is on."""
    attention_mask: torch.Tensor | None
    """(B, L) int64, 1 = real token; None when no position is padded (attention then takes its fast path)."""
    labels: torch.Tensor | None
    """(B, L) int64 original ids at masked positions, -100 elsewhere; None without MLM."""
    counts: Counts
    token_types: torch.Tensor | None = None
    """(B, L) int64 token type ids, for models that take them; None: the model's own default."""
    lengths: tuple[int, ...] | None = None
    """Real tokens of each sequence, which come first; None: unknown."""
    step: int | None = None
    """The optimizer step that it is part of, from 0; None: of none, or of one that does not matter."""

    @property
    def token_mask(self) -> torch.Tensor | None:
        """(B, L) bool, or None when every position is real."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def to(self, device: torch.device) -> Self:
        """Copied to `device` without waiting, when the batch is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In page-locked host memory, from which a GPU copies on its own."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: change(value) for name, value in values if isinstance(value, torch.Tensor)})


@dataclass(frozen=True)
class TaskBatch(Batch):
    """One micro batch of task rows."""

    targets: torch.Tensor | None = None
    """(B,) int64 label indices, (B,) float32 regression targets, or (B, 2) int64 span; None when unlabelled."""
    rows: torch.Tensor | None = None
    """(B,) int64, on the host: which rows of the split these are."""

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), rows=self.rows)
