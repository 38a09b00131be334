"""Rows of classification and regression tasks: as they are written, and with their labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """n rows of one split as they are written."""

    source: str
    """File, or folder or hub name with the split."""
    lines: Sequence[int]
    """(n,) where each row starts, for messages."""
    first: list[str]
    second: list[str] | None
    labels: list[Any] | None
    """(n,) text or JSON values; None: unlabelled."""
    ids: list[str]
    notes: tuple[str, ...] = ()
    """What was left out or read otherwise than it looks, for people."""

    def __len__(self) -> int:
        return len(self.first)

    def place(self, row: int) -> str:
        return f"{self.source}:{self.lines[row]}"

    def take(self, rows: Sequence[int], note: str) -> Rows:
        """Returns these rows alone, and says why."""
        return Rows(
            source=self.source,
            lines=[self.lines[row] for row in rows],
            first=[self.first[row] for row in rows],
            second=None if self.second is None else [self.second[row] for row in rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            notes=(*self.notes, note),
        )


@dataclass(frozen=True)
class Split:
    """n rows of a classification or regression task."""

    name: str
    first: list[str]
    second: list[str] | None
    labels: Labels | None
    """(n,) int64 label indices or float32 targets; None: unlabelled."""
    ids: list[str]
    """The file's own index column where it has one, else row numbers from 0."""

    def __len__(self) -> int:
        return len(self.first)


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
