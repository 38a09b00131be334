"""Gold labels: which rows have one, which labels there are, and rows with their labels as numbers."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.tasks.rows import Labels, Rows, Split
from engine.tasks.specs import TaskSpec
from engine.tasks.spelling import is_label, label_text, spelling

UNLABELLED = frozenset(
    [
        "-1", "-100", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "hidden", "unlabeled",
        "unlabelled", "no label", "no gold label",
    ]
)  # fmt: skip
"""What people and tools write where there is no gold label, in any case; they write dashes and question marks, too."""


def gold_rows(rows: Rows, spec: TaskSpec, *, leave_out: bool, setting: str | None) -> Rows:
    """Returns the rows that have a gold label. A label that the task names is one, whatever it looks like.

    leave_out: leave out and count the others. Otherwise one of them raises UserError. setting: section of a custom
    task, whose labels the user can name.
    """
    assert rows.labels is not None, rows.source
    named = frozenset(map(label_text, spec.labels))
    without = [row for row, value in enumerate(rows.labels) if not _is_gold(value, spec, named)]
    if not without:
        return rows
    written = _frequency_text(repr(rows.labels[row]) for row in without)
    found = f"{len(without):,} of {len(rows):,} rows have no gold label ({written})"
    remedy = ""
    if setting is not None and spec.kind == "classification":
        remedy = f"; where that is a label, name all labels in {setting}.labels"
    if len(without) == len(rows):
        raise UserError(f"{rows.source}: {found}; give labelled rows{remedy}")
    if not leave_out:
        raise UserError(
            f"{rows.place(without[0])}: {found}; write task.unlabelled=leave_out to go on without these rows{remedy}"
        )
    kept = sorted(set(range(len(rows))) - set(without))
    return rows.take(kept, f"{rows.source}: {found} and are left out")


def _is_gold(value: Any, spec: TaskSpec, named: frozenset[str]) -> bool:
    text = label_text(value)
    if spec.kind == "regression":
        number = _number(value)
        if math.isfinite(number):  # -1 is a number like any other, unless the task cannot have it
            return number != -1 or spec.target_range is None
    elif text in named:
        return True
    return bool(text.strip("-–—_?. ")) and text.casefold() not in UNLABELLED


def occurring_labels(rows: Rows, setting: str) -> tuple[str, ...]:
    """Returns the labels that occur, sorted: as numbers where all are whole numbers, else as text. Raises UserError
    where they cannot be those of a classification, or where two of them may be one."""
    assert rows.labels is not None, rows.source
    there = {label_text(value): row for row, value in reversed(list(enumerate(rows.labels)))}
    for label, row in there.items():
        if not is_label(label):
            raise UserError(f"{rows.place(row)}: label {label!r} is empty or has a tab or line break; repair the line")
    if len(there) < 2:
        raise UserError(f"{rows.source}: every row has the label {next(iter(there))!r}; give rows of two labels")
    _refuse_two_spellings(rows, list(there), setting)
    _refuse_several(rows, there, setting)
    numbers = {label: _number(label) for label in there}
    if not all(map(math.isfinite, numbers.values())):
        return tuple(sorted(there))
    for label, number in numbers.items():
        if number != int(number):
            raise UserError(
                f"{rows.place(there[label])}: the labels are numbers like {label}; write {setting}.kind=regression, or "
                f"name all labels in {setting}.labels if they are classes"
            )
    return tuple(sorted(there, key=lambda label: (numbers[label], label)))


def _refuse_two_spellings(rows: Rows, labels: Sequence[str], setting: str) -> None:
    first: dict[str, str] = {}
    for label in sorted(labels):
        other = first.setdefault(spelling(label), label)
        if other != label:
            assert rows.labels is not None
            counts = Counter(map(label_text, rows.labels))
            raise UserError(
                f"{rows.source}: the labels {other!r} ({counts[other]:,} rows) and {label!r} ({counts[label]:,} rows) "
                f"differ in spelling only; write them alike, or name all labels in {setting}.labels if both are labels"
            )


def _refuse_several(rows: Rows, labels: Mapping[str, int], setting: str) -> None:
    for label, row in sorted(labels.items(), key=itemgetter(1)):
        parts = [part.strip() for part in re.split("[,;|]", label)]
        if re.fullmatch(r"\[.*\]", label) or (len(parts) > 1 and set(parts) <= labels.keys()):
            raise UserError(
                f"{rows.place(row)}: label {label!r} looks like several labels, and a row has one; write one a row, or "
                f"name all labels in {setting}.labels if it is one"
            )


def label_meanings(names: Sequence[str], spec: TaskSpec) -> tuple[str, ...] | None:
    """Returns the task's label that each of these names means, in their order, whatever their spelling; None where they
    are not all labels of the task, each once. For the names of a model's outputs and of a data set's classes."""
    for form in (str, spelling):
        for known in (spec.labels, spec.label_names):
            meant = dict(zip(map(form, known), spec.labels, strict=True))
            found = tuple(meant.get(form(name), "") for name in names)
            if sorted(found) == sorted(spec.labels):
                return found
    return None


def to_split(name: str, rows: Rows, spec: TaskSpec) -> Split:
    """Returns the rows with their labels as numbers. Raises UserError that names the file and line of an unknown label,
    or of what is no number that the task can have."""
    labels: Labels | None = None
    if rows.labels is not None:
        labels = _indices(rows, spec) if spec.kind == "classification" else _numbers(rows, spec)
    return Split(name, rows.first, rows.second, labels, rows.ids)


def _indices(rows: Rows, spec: TaskSpec) -> npt.NDArray[np.int64]:
    assert rows.labels is not None, rows.source
    index = {label_text(label): number for number, label in enumerate(spec.labels)}
    texts = [label_text(value) for value in rows.labels]
    unknown = [row for row, text in enumerate(texts) if text not in index]
    if unknown:
        given = texts[unknown[0]]
        alike = [label for label in spec.labels if spelling(label) == spelling(given)]
        near = alike or difflib.get_close_matches(given, spec.labels, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "repair the line"
        count = f", and {len(unknown) - 1:,} more rows have none of them" if len(unknown) > 1 else ""
        valid = ", ".join(map(repr, spec.labels[:20]))
        raise UserError(
            f"{rows.place(unknown[0])}: unknown label {given!r} (the labels of {spec.name}: {valid}{count}); {hint}"
        )
    return np.array([index[text] for text in texts], np.int64)


def _numbers(rows: Rows, spec: TaskSpec) -> npt.NDArray[np.float32]:
    assert rows.labels is not None, rows.source
    with np.errstate(over="ignore"):  # what float32 does not hold becomes inf, and an error below
        numbers = np.array([_number(value) for value in rows.labels], np.float64).astype(np.float32)
    if not np.isfinite(numbers).all():
        row = int(np.isfinite(numbers).argmin())
        given = rows.labels[row]
        readings = [given.replace(",", ".")] if isinstance(given, str) else []
        if isinstance(given, str) and re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", given.strip()):
            readings.append(given.replace(",", ""))
        finite = [reading for reading in readings if math.isfinite(_number(reading))]
        remedy = f"write {' or '.join(finite)}" if finite else "repair the line"
        raise UserError(f"{rows.place(row)}: label {given!r} is not a finite number; {remedy}")
    low, high = spec.target_range or (-math.inf, math.inf)
    outside = (numbers < low) | (numbers > high)
    if outside.any():
        row = int(outside.argmax())
        raise UserError(
            f"{rows.place(row)}: label {rows.labels[row]!r} is not in {low:g} to {high:g}, where those of {spec.name} "
            "lie; repair the line"
        )
    return numbers


def _number(value: Any) -> float:
    """Reads a number; nan for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _frequency_text(values: Any) -> str:
    """Returns the most frequent values with their counts, at most five."""
    counts = Counter(values).most_common()
    more = f", {len(counts) - 5} others" if len(counts) > 5 else ""
    return ", ".join(f"{value} {count:,}" for value, count in counts[:5]) + more
