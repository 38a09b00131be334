"""What a person should know of a task's rows before a model learns them: each remark one sentence, for the banner."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.tasks.beir import RetrievalSplit
from engine.tasks.rows import Rows, Split
from engine.tasks.specs import TaskSpec
from engine.tasks.squad import SquadSplit

AnyRows = Split | SquadSplit | RetrievalSplit
_BYTES = re.compile(r"""b(['"]).*\1""", re.DOTALL)
_NOTHING = frozenset({"nan", "none", "null", "na", "n/a", "<na>"})


def remarks(spec: TaskSpec, rows: Mapping[str, Rows], splits: Mapping[str, Split]) -> list[str]:
    """Returns all remarks. `rows`: the same splits as they are written, with notes on their files."""
    found: list[str] = []
    for name, split in splits.items():
        about = (*_rows_remarks(rows[name]), *_labels_remarks(spec, split))
        found += [*rows[name].notes, *(f"{rows[name].source}: {text}" for text in about)]
    return found + shared_texts(spec.name, splits)


def shared_texts(task: str, splits: Mapping[str, AnyRows]) -> list[str]:
    """Counts the rows of other splits whose texts are in training as well, whatever their case and spaces; of a
    retrieval, the queries."""
    if "train" not in splits:
        return []
    trained = set(_texts(splits["train"]))
    found = []
    for name, split in splits.items():
        count = sum(texts in trained for texts in _texts(split))
        if name != "train" and count:
            found.append(
                f"{task}: {count:,} of {len(split):,} {name} rows have the texts of a training row; "
                "memorised rows score there"
            )
    return found


def _texts(split: AnyRows) -> Iterator[tuple[str, ...]]:
    columns: tuple[list[str] | None, ...]
    if isinstance(split, RetrievalSplit):
        columns = (split.queries,)
    elif isinstance(split, SquadSplit):
        columns = (split.questions, split.contexts)
    else:
        columns = (split.first, split.second)
    given = [column for column in columns if column is not None]
    plain = {text: " ".join(text.split()).casefold() for column in given for text in set(column)}
    return (tuple(plain[text] for text in texts) for texts in zip(*given, strict=True))


def _rows_remarks(rows: Rows) -> Iterator[str]:
    empty = sum(not text.strip() for column in (rows.first, rows.second or ()) for text in column)
    if empty:
        yield f"empty texts: {empty:,}"
    nothing = sum(text.strip().casefold() in _NOTHING for column in (rows.first, rows.second or ()) for text in column)
    if nothing:
        yield f"texts that say nan, None or the like, as tables write empty cells: {nothing:,}"
    printed = sum(bool(_BYTES.fullmatch(text)) for column in (rows.first, rows.second or ()) for text in column)
    if printed:
        yield f"texts between b' and ', as Python prints bytes (write them decoded): {printed:,}"
    spaced = sum(isinstance(label, str) and label != label.strip() for label in rows.labels or ())
    if spaced:
        yield f"labels that are read without the spaces around them: {spaced:,}"


def _labels_remarks(spec: TaskSpec, split: Split) -> Iterator[str]:
    if split.labels is None:
        return
    values: Any
    values, counts = np.unique(split.labels, return_counts=True)
    if len(values) == 1:
        label = repr(spec.labels[values[0]]) if spec.kind == "classification" else f"{values[0]:g}"
        yield f"every row has the label {label}"
    elif spec.kind == "classification" and split.name == "train" and len(values) < len(spec.labels):
        absent = [repr(label) for index, label in enumerate(spec.labels) if index not in values]
        yield f"no row has the label {', '.join(absent)}"
    elif spec.kind == "classification" and split.name == "train" and len(values) > max(20, len(split) // 3):
        yield f"{len(values):,} labels for {len(split):,} rows; is that the column of the labels?"
    elif spec.kind == "regression" and (values < 0).sum() == 1 and counts[0] > 1:
        yield (
            f"{counts[0]:,} rows have the label {values[0]:g}, the only negative one; remove them if it stands for "
            "no gold label"
        )
