"""Task texts as token ids: one ragged array for all rows of a split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """n rows of token ids, special tokens included and never padded: row i is `ids[starts[i]:starts[i + 1]]`."""

    ids: npt.NDArray[np.int32]
    """(total,)"""
    starts: Ints
    """(n + 1,)"""
    types: npt.NDArray[np.int8] | None = None
    """(total,) token type ids, for models that take them."""
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32] | None = None
    """(n,) label indices, (n,) float32 regression targets, or (n, 2) first and last token of a span; None where there
    are no labels."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each row."""
        return np.diff(self.starts)
