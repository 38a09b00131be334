"""The batch that loader, models and losses share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

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
    pairs_within: Mapping[int, float] = field(default_factory=dict)
    """Window in tokens -> those of `token_pairs` that are no further apart."""

    @classmethod
    def from_lengths(cls, lengths: npt.NDArray[np.int64], *, masked: int = 0, windows: Iterable[int] = ()) -> Counts:
        """Returns the counts of one micro batch whose rows have `lengths` (B,) real tokens and are padded to the
        longest.

        masked: positions with an MLM label. windows: the windows that `pairs_within` counts, in tokens to each side.
        """
        positions, longest = len(lengths) * int(lengths.max()), int(lengths.max())
        return cls(
            sequences=len(lengths),
            tokens=int(lengths.sum()),
            token_pairs=int((lengths**2).sum()),
            positions=positions,
            position_pairs=positions * longest,
            masked=masked,
            pairs_within={window: _pairs_within(window, lengths) for window in windows},
        )

    def __add__(self, other: Counts) -> Counts:
        windows = {*self.pairs_within, *other.pairs_within}
        one, two = (replace(x, pairs_within={w: x.pairs_within.get(w, 0) for w in windows}) for x in (self, other))
        return one.with_values([a + b for a, b in zip(one.as_list(), two.as_list(), strict=True)])

    def scaled(self, factor: float) -> Counts:
        return self.with_values([value * factor for value in self.as_list()])

    def as_list(self) -> list[float]:
        """Returns all numbers, in an order that depends on the windows alone."""
        plain = [float(getattr(self, f.name)) for f in fields(self) if f.name != "pairs_within"]
        return plain + [float(self.pairs_within[window]) for window in sorted(self.pairs_within)]

    def with_values(self, values: Sequence[float]) -> Counts:
        """Returns counts of the same windows with the numbers of an `as_list`."""
        names = [f.name for f in fields(self) if f.name != "pairs_within"]
        plain: dict[str, Any] = dict(zip(names, values, strict=False))
        windows = zip(sorted(self.pairs_within), values[len(names) :], strict=True)
        return Counts(**plain, pairs_within=dict(windows))

    def pairs(self, window: int | None) -> float:
        """Returns the pairs of real tokens that are in the window; None: all."""
        return self.token_pairs if window is None else self.pairs_within[window]


def _pairs_within(window: int, lengths: npt.NDArray[np.int64]) -> int:
    """Returns how many pairs of positions of sequences are no further apart than the window."""
    reach = np.minimum(window, lengths - 1)
    return int((lengths * (2 * reach + 1) - reach * (reach + 1)).sum())


@dataclass(frozen=True)
class Batch:
    """One micro batch of B sequences of L tokens."""

    input_ids: torch.Tensor
    """(B, L) int64, already masked when MLM is on."""
    attention_mask: torch.Tensor | None
    """(B, L) int64, 1 = real token; None when no position is padded (attention then takes its fast path)."""
    labels: torch.Tensor | None
    """(B, L) int64 original ids at masked positions, UNSCORED_LABEL elsewhere; None without MLM."""
    counts: Counts
    token_types: torch.Tensor | None = None
    """(B, L) int64 token type ids, for models that take them; None: the model's own default."""
    lengths: tuple[int, ...] | None = None
    """Real tokens of each sequence, which come first; None: unknown."""
    step: int | None = None
    """The optimizer step that it is part of, from 0; None: of none, or of one that does not matter."""

    @property
    def token_mask(self) -> torch.Tensor | None:
        """Mask of the real tokens, (B, L) bool; None when every position is real."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def to(self, device: torch.device) -> Self:
        """Returns the batch on `device`, copied without waiting when it is pinned."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Returns the batch in page-locked host memory, from which a GPU copies on its own."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class TaskBatch(Batch):
    """One micro batch of task rows."""

    targets: torch.Tensor | None = None
    """(B,) int64 label indices, (B,) float32 regression targets, or (B, 2) int64 span; None when unlabelled."""
    rows: torch.Tensor | None = None
    """(B,) int64, on the host: which rows of the split these are."""

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), rows=self.rows)
