"""Rows of classification and regression tasks: as they are written, and with their labels as numbers."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.tasks.specs import TaskSpec, is_label

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
    skipped: int = 0
    """Lines left out because they have too few columns."""

    def __len__(self) -> int:
        return len(self.first)

    def place(self, row: int) -> str:
        return f"{self.source}:{self.lines[row]}"


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


def labels_in(rows: Rows) -> tuple[str, ...]:
    """The labels that occur, sorted: as numbers where all are whole numbers, else as text. Raises UserError
    where they cannot be those of a classification."""
    assert rows.labels is not None, rows.source
    there = {_label_text(value): row for row, value in reversed(list(enumerate(rows.labels)))}
    for label, row in there.items():
        if not is_label(label):
            raise UserError(f"{rows.place(row)}: label {label!r} is empty or has a tab or line break; repair the line")
    if len(there) < 2:
        raise UserError(f"{rows.source}: every row has the label {next(iter(there))!r}; give rows of two labels")
    try:
        return tuple(sorted(there, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(there))


def _label_text(value: Any) -> str:
    """A label as text: JSON numbers and truth values as JSON writes them."""
    return value if isinstance(value, str) else json.dumps(value)


def to_split(name: str, rows: Rows, spec: TaskSpec) -> Split:
    """Rows with their labels as numbers. Raises UserError that names the file and line of an unknown label, or of what
    is not a finite number."""
    labels: Labels | None = None
    if rows.labels is not None:
        labels = _indices(rows, spec) if spec.kind == "classification" else _numbers(rows)
    return Split(name, rows.first, rows.second, labels, rows.ids)


def _indices(rows: Rows, spec: TaskSpec) -> npt.NDArray[np.int64]:
    assert rows.labels is not None, rows.source
    index = {label: number for number, label in enumerate(spec.labels)}
    found = [index.get(_label_text(value), -1) for value in rows.labels]
    if -1 in found:
        row = found.index(-1)
        given = _label_text(rows.labels[row])
        near = difflib.get_close_matches(given, spec.labels, n=1)
        valid = ", ".join(map(repr, spec.labels[:20]))
        hint = f"did you mean {near[0]!r}?" if near else "repair the line"
        raise UserError(f"{rows.place(row)}: unknown label {given!r} (the labels of {spec.name}: {valid}); {hint}")
    return np.array(found, np.int64)


def _numbers(rows: Rows) -> npt.NDArray[np.float32]:
    assert rows.labels is not None, rows.source
    with np.errstate(over="ignore"):  # what float32 does not hold becomes inf, and an error below
        numbers = np.array([_number(value) for value in rows.labels], np.float64).astype(np.float32)
    if not np.isfinite(numbers).all():
        row = int(np.isfinite(numbers).argmin())
        raise UserError(f"{rows.place(row)}: label {rows.labels[row]!r} is not a finite number; repair the line")
    return numbers


def _number(value: Any) -> float:
    """nan for what is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


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
