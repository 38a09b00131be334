"""GLUE and SQuAD as Hugging Face `datasets`: from the hub, or a folder that save_to_disk wrote or that was cloned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.prepare.formats import is_saved_dataset, offline_if_unreachable
from engine.errors import UserError, first_line
from engine.tasks.labels import label_meanings
from engine.tasks.rows import Rows
from engine.tasks.specs import Columns, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Splits = Mapping[str, "Dataset"]
WITHOUT_GLUE = " (or take the task of examples/finetune.yaml, which `make data` fetches)"
"""End of a message about tasks that cannot be had: the other way to a task."""
_SHARDS = "*-[0-9]*-of-[0-9]*.parquet"


def hub_splits(path: str, config: str | None) -> Splits:
    """Returns all splits of a hub data set by the hub's names. When the hub cannot be reached, what was loaded before
    counts.

    Raises UserError that names task.data_dir as the remedy.
    """
    import datasets

    name = path if config is None else f"{path} ({config})"
    try:
        with offline_if_unreachable() as reachable:
            splits: Splits = datasets.load_dataset(path, config)
    except Exception as error:  # network, hub, file system: datasets has no common base class
        reason = first_line(error)
        if not reachable:
            reason = "the hub cannot be reached from here, and its cache has no copy"
        raise UserError(
            f"task.data_dir is unset, and the hub data set {name} is not available ({reason}); set task.data_dir to a "
            f"folder with the task's files{WITHOUT_GLUE}"
        ) from None
    return splits


def holds_splits(folder: Path) -> bool:
    """Tells whether all splits of a data set lie in this folder, as save_to_disk or the hub's repository has them."""
    return is_saved_dataset(folder) or any(folder.glob(_SHARDS))


def saved_splits(folder: Path) -> Splits:
    """Returns all splits of such a folder, by the hub's names. Raises UserError for one that cannot be read."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder)) if is_saved_dataset(folder) else _cloned_splits(folder)
    except Exception as error:  # datasets raises whatever its readers raise
        raise UserError(f"{folder}: not a readable `datasets` folder ({first_line(error)}); save it again") from None
    if not isinstance(data, datasets.DatasetDict):
        raise UserError(f"{folder}: holds one split; save a DatasetDict with the splits train and validation")
    splits: Splits = data
    return splits


def _cloned_splits(folder: Path) -> DatasetDict:
    import datasets
    import pyarrow.parquet as pq
    from datasets.table import InMemoryTable

    shards: dict[str, list[Dataset]] = {}
    for path in sorted(folder.glob(_SHARDS)):
        split, _, _ = path.name.partition("-")
        shards.setdefault(split, []).append(datasets.Dataset(InMemoryTable(pq.read_table(path))))
    return datasets.DatasetDict({split: datasets.concatenate_datasets(parts) for split, parts in shards.items()})


def hub_split_name(name: str) -> str:
    """Returns the hub's name of our split: dev_matched is validation_matched there."""
    return name.replace("dev", "validation")


def find_split(splits: Splits, name: str, source: str) -> Dataset:
    try:
        return splits[hub_split_name(name)]
    except KeyError:
        there = ", ".join(splits)
        raise UserError(
            f"{source}: no split {hub_split_name(name)!r} (it has: {there}); save it with that one"
        ) from None


def hub_rows(data: Dataset, source: str, columns: Columns, *, spec: TaskSpec, labelled: bool) -> Rows:
    """Returns the rows of one split, as read_rows gives those of a file: classes by name, not by index.

    Unless `labelled`, labels are not read. Raises UserError for columns or classes that are not the hub's.
    """
    texts_and_label = [columns.first, columns.second, columns.label if labelled else None]
    names = [name for name in texts_and_label if name is not None]
    for name in names:
        if name not in data.column_names:
            known = ", ".join(map(repr, data.column_names))
            raise UserError(f"{source}: no column {name!r} (its columns: {known}); save the hub's data set unchanged")
    if len(data) == 0:
        raise UserError(f"{source}: has no rows; save the hub's data set unchanged")
    ids = next((name for name in columns.ids if name in data.column_names), None)
    values = data.select_columns([*dict.fromkeys([*names, *([ids] if ids else [])])]).to_dict()
    for name in filter(None, texts_and_label[:2]):
        for row, value in enumerate(values[name], start=1):
            if not isinstance(value, str):
                raise UserError(f"{source}:{row}: {name!r} is {value!r}, not text; save the hub's data set unchanged")
    labels = values[columns.label] if labelled else None
    if labels is not None and spec.labels:
        labels = _label_names(labels, data.features[columns.label], source, spec)
    return Rows(
        source=source,
        lines=range(1, len(data) + 1),
        first=values[columns.first],
        second=None if columns.second is None else values[columns.second],
        labels=labels,
        ids=[str(value) for value in (values[ids] if ids else range(len(data)))],
    )


def _label_names(given: list[Any], feature: Any, source: str, spec: TaskSpec) -> list[Any]:
    """Returns label names instead of indices, of which a copy may have another order; what is no index stays, and is
    reported as an unknown label."""
    names: Any = getattr(feature, "names", None)
    by_index = spec.labels if names is None else label_meanings(names, spec)
    if by_index is None:
        raise UserError(
            f"{source}: its classes are {', '.join(names)}, and those of {spec.name} {', '.join(spec.label_names)}; "
            "save the hub's data set unchanged"
        )
    return [by_index[value] if isinstance(value, int) and 0 <= value < len(by_index) else value for value in given]
