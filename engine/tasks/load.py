"""Loading a task: names as the user writes them, official folders, the hub, the user's own files, and the row caps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.config.finetune import TaskDataConfig
from engine.data.prepare.formats import is_saved_dataset
from engine.errors import UserError
from engine.tasks.beir import read_beir
from engine.tasks.files import read_rows
from engine.tasks.hub import WITHOUT_GLUE, find_split, holds_splits, hub_rows, hub_split_name, hub_splits, saved_splits
from engine.tasks.labels import gold_rows, occurring_labels, to_split
from engine.tasks.remarks import AnyRows, remarks, shared_texts
from engine.tasks.rows import Rows
from engine.tasks.specs import (
    DIAGNOSTIC,
    GLUE_TASKS,
    Columns,
    TaskSpec,
    check_custom_names,
    official_name,
    plain_name,
    task_spec,
)
from engine.tasks.tables import beside

if TYPE_CHECKING:
    from engine.tasks.squad import SquadSplit

AnySplit = TypeVar("AnySplit", bound=AnyRows)
GLUE_HUB = "nyu-mll/glue"
HELD_OUT = "held-out"
DIAGNOSTIC_FILES = ("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX/diagnostic.tsv")
"""Where task.data_dir may hold the diagnostic set."""
_SQUAD_FILES = {"SQuAD-v1.1": "{}-v1.1.json", "SQuAD-v2": "{}-v2.0.json"}
_SQUAD_HUB = {"SQuAD-v1.1": "rajpurkar/squad", "SQuAD-v2": "rajpurkar/squad_v2"}


@dataclass(frozen=True)
class TaskData:
    spec: TaskSpec
    splits: dict[str, AnyRows]
    sha256: str
    """Hash of the train and dev rows, after task.train_rows and task.dev_rows: the same for two runs that see the
    same."""
    warnings: tuple[str, ...] = ()
    """What was left out of the files, and what else of them a person should know, for the banner."""
    has_one_split: bool = False
    """Whether `train` is a part of `dev`."""


def resolve_names(names: Sequence[str], config: TaskDataConfig) -> tuple[list[str], list[str]]:
    """Returns the tasks to run by official spelling, each once and in the order of `names`; and the GLUE tasks that
    `glue` stands for but that task.data_dir has no folder of. A task that is named itself is never left out.

    Raises UserError for a name that is no task.
    """
    check_custom_names(config)
    chosen: dict[str, None] = {}
    absent: list[str] = []
    for name in names:
        if plain_name(name) != "glue":
            chosen[task_spec(name, config).name] = None
            continue
        there = [
            task for task in GLUE_TASKS if config.data_dir is None or _task_folder(task, _root(config)) is not None
        ]
        if not there:
            raise UserError(f"task {name!r}: task.data_dir={config.data_dir!r} has no folder of a GLUE task; add some")
        chosen |= dict.fromkeys(there)
        absent = [task for task in GLUE_TASKS if task not in there]
    return list(chosen), [task for task in absent if task not in chosen]


def load_task(name: str, config: TaskDataConfig, *, test: bool = False) -> TaskData:
    """Reads the train, dev and (with `test`) test splits, and caps their rows. A second or two for the big tasks.

    Where all rows are in one split, it is `dev`, and `train` the half of it that a hash of the ids chooses: nothing is
    trained on it, but a search that chooses by its score does not see the other half.

    task.train_rows draws rows at random, always the same ones and a part of those that a larger cap draws, in the
    order of the file; task.dev_rows takes the first. Test splits are never capped, and absent ones are left out unless
    the user named the file. Raises UserError that names the file and line, or the setting.
    """
    spec = task_spec(name, config)
    splits: dict[str, AnyRows]
    if spec.kind == "span":
        splits, warnings = _load_squad(spec, config)
    elif spec.kind == "retrieval":
        splits, warnings = _load_retrieval(spec, config)
    else:
        own = spec.name in config.custom
        rows = _custom_rows(spec, config, test=test) if own else _glue_rows(spec, config, test=test)
        spec, splits, warnings = _with_labels(spec, rows, config)
    has_one_split = "train" not in splits
    if has_one_split:
        seen = np.flatnonzero(seen_by_searches(splits["dev"]))
        splits["train"] = replace(take_rows(splits["dev"], seen), name="train")
        warnings.append(
            f"{spec.name}: {len(splits['dev']):,} rows in one split; a fitness comes from {len(splits['train']):,} of "
            "them, chosen by a hash of their ids"
        )
    absent = [name for name in spec.test_splits if test and name not in splits]
    if absent:
        warnings.append(f"{spec.name}: no {' and no '.join(absent)} split, whose predictions the GLUE server needs")
    if config.train_rows is not None:
        drawn = np.random.default_rng(0).permutation(len(splits["train"]))[: config.train_rows]
        splits["train"] = take_rows(splits["train"], np.sort(drawn))
    if config.dev_rows is not None:
        for split in spec.dev_splits:
            splits[split] = take_rows(splits[split], np.arange(len(splits[split]))[: config.dev_rows])
    return TaskData(spec, splits, _digest(spec, splits), tuple(dict.fromkeys(warnings)), has_one_split)


def seen_by_searches(split: AnyRows) -> npt.NDArray[np.bool_]:
    """Returns (n,) which rows of the only split of a task a fitness comes from: about half of them, and always at least
    one, decided by their ids alone."""
    seen = np.array([hashlib.sha256(row.encode()).digest()[0] % 2 == 0 for row in split.ids])
    return seen if seen.any() else ~seen


def _load_retrieval(spec: TaskSpec, config: TaskDataConfig) -> tuple[dict[str, AnyRows], list[str]]:
    folder = config.custom[spec.name].folder
    assert folder is not None, spec.name
    splits, warnings = read_beir(Path(folder), key=f"task.custom.{spec.name}.folder")
    return dict(splits), [*warnings, *shared_texts(spec.name, splits)]


def hold_out(task: TaskData, *, parts: int) -> TaskData:
    """Returns the task with every `parts`-th of its training rows as its only dev split; its own dev rows are left
    alone, for the final evaluation."""
    train = task.splits["train"]
    held = np.arange(len(train)) % parts == parts - 1
    splits = {
        "train": take_rows(train, np.flatnonzero(~held)),
        HELD_OUT: replace(take_rows(train, np.flatnonzero(held)), name=HELD_OUT),
    }
    return replace(task, spec=replace(task.spec, dev_splits=(HELD_OUT,)), splits=splits)


def _root(config: TaskDataConfig) -> Path:
    root = Path(config.data_dir or "")
    if not root.is_dir():
        raise UserError(f"task.data_dir={config.data_dir!r}: no such folder{beside(root)}{WITHOUT_GLUE}")
    return root


def _task_folder(name: str, root: Path) -> Path | None:
    """Returns the task's folder, in any spelling of its name; the official spelling goes first. One SQuAD folder may
    hold the files of both versions."""
    if (root / name).is_dir():
        return root / name
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    own = [path for path in folders if official_name(path.name) == name]
    shared = [path for path in folders if name in _SQUAD_FILES and plain_name(path.name) == "squad"]
    return next(iter(own + shared), None)


def _existing_folder(name: str, config: TaskDataConfig) -> Path:
    root = _root(config)
    folder = _task_folder(name, root)
    if folder is None:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:20]) or "nothing"
        raise UserError(f"task.data_dir={config.data_dir!r}: no folder {name} there (it has: {there}); add it")
    return folder


def _with_labels(
    spec: TaskSpec, rows: dict[str, Rows], config: TaskDataConfig
) -> tuple[TaskSpec, dict[str, AnyRows], list[str]]:
    """Returns the final description of the task, the splits with their labels, and remarks."""
    setting = f"task.custom.{spec.name}" if spec.name in config.custom else None
    leave_out = config.unlabelled == "leave_out"
    for name in [name for name in rows if name not in spec.test_splits]:
        rows[name] = gold_rows(rows[name], spec, leave_out=leave_out, setting=setting)
    if setting is not None and spec.kind == "classification" and not spec.labels:
        spec = replace(spec, labels=occurring_labels(rows["train"], setting))
    splits = {name: to_split(name, found, spec) for name, found in rows.items()}
    return spec, dict(splits), remarks(spec, rows, splits)


def _glue_rows(spec: TaskSpec, config: TaskDataConfig, *, test: bool) -> dict[str, Rows]:
    folder = None if config.data_dir is None else _existing_folder(spec.name, config)
    names = ["train", *spec.dev_splits, *(spec.test_splits if test else ())]
    saved = folder is not None and holds_splits(folder)
    found = _hub_rows(spec, names, folder) if folder is None or saved else _file_rows(spec, names, folder)
    if DIAGNOSTIC in names and folder is not None:
        assert spec.layout is not None, spec.name
        path = next((path for place in DIAGNOSTIC_FILES if (path := folder.parent / place).is_file()), None)
        if path is not None:
            found[DIAGNOSTIC] = read_rows(path, spec.layout.files, labelled=False)
    return found


def _file_rows(spec: TaskSpec, names: Sequence[str], folder: Path) -> dict[str, Rows]:
    layout = spec.layout
    assert layout is not None, spec.name
    found: dict[str, Rows] = {}
    for name in names:
        path, is_test = folder / f"{name}.tsv", name in spec.test_splits
        if is_test and not path.exists():
            continue
        headerless = () if is_test else layout.headerless
        found[name] = read_rows(
            path, layout.files, labelled=not is_test, headerless=headerless, skip_short=layout.skip_short
        )
    return found


def _hub_rows(spec: TaskSpec, names: Sequence[str], folder: Path | None) -> dict[str, Rows]:
    layout = spec.layout
    assert layout is not None, spec.name
    source = f"{GLUE_HUB}/{layout.config}" if folder is None else str(folder)
    splits = hub_splits(GLUE_HUB, layout.config) if folder is None else saved_splits(folder)
    found: dict[str, Rows] = {}
    for name in names:
        is_test = name in spec.test_splits
        if is_test and hub_split_name(name) not in splits:
            continue
        data, place = find_split(splits, name, source), f"{source}:{hub_split_name(name)}"
        found[name] = hub_rows(data, place, layout.hub, spec=spec, labelled=not is_test)
    return found


def _load_squad(spec: TaskSpec, config: TaskDataConfig) -> tuple[dict[str, AnyRows], list[str]]:
    from engine.tasks.answers import learnable_answers, scored_remarks

    folder = None if config.data_dir is None else _existing_folder(spec.name, config)
    parts = _saved_squad(spec, folder) if folder is None or holds_splits(folder) else _squad_files(spec, folder)
    found: dict[str, AnyRows] = {}
    warnings: list[str] = []
    for source, split in parts:
        if split.answers is None:
            raise UserError(f"{source}: the {split.name} split has no answers; give the official file")
        if split.name == "train":
            split, remarks = learnable_answers(split, source, leave_out=config.unlabelled == "leave_out")
        else:
            remarks = scored_remarks(split, source)
        found[split.name] = split
        warnings += remarks
    return found, [*warnings, *shared_texts(spec.name, found)]


def _squad_files(spec: TaskSpec, folder: Path) -> Iterator[tuple[str, SquadSplit]]:
    """Yields file and content of each split."""
    from engine.tasks.squad import read_squad

    for name in ("train", *spec.dev_splits):
        path = folder / _SQUAD_FILES[spec.name].format(name)
        yield str(path), read_squad(path, name=name, v2=spec.name == "SQuAD-v2")


def _saved_squad(spec: TaskSpec, folder: Path | None) -> Iterator[tuple[str, SquadSplit]]:
    """Yields place and content of each split, from the hub without a folder."""
    from engine.tasks.squad import squad_from_rows

    source = _SQUAD_HUB[spec.name] if folder is None else str(folder)
    splits = hub_splits(source, None) if folder is None else saved_splits(folder)
    for name in ("train", *spec.dev_splits):
        place = f"{source}:{hub_split_name(name)}"
        split = replace(squad_from_rows(find_split(splits, name, source), place), name=name)
        if spec.name != "SQuAD-v2" and [] in (split.answers or []):
            raise UserError(f"{place}: has questions without an answer, as SQuAD v2 has; use the task SQuAD-v2")
        yield place, split


def _custom_rows(spec: TaskSpec, config: TaskDataConfig, *, test: bool) -> dict[str, Rows]:
    custom, key = config.custom[spec.name], f"task.custom.{spec.name}"
    columns = Columns(
        first=custom.text, second=custom.text_pair, label=custom.label, ids=("index", "id", "idx"), setting=key
    )
    files = {"train": custom.train, "dev": custom.dev, "test": custom.test if test else None}
    found: dict[str, Rows] = {}
    for name, file in files.items():
        if file is None:
            continue
        path = Path(file)
        if not path.is_file():
            if is_saved_dataset(path):
                what = "is a folder of `datasets`; write each split to a file (to_parquet)"
            elif path.is_dir():
                what = f"is a folder; name a file{beside(path / '?').partition(';')[0]}"
            elif path.exists():
                what = "is a pipe or a device; write its rows to a file"
            else:
                what = f"no such file{beside(path)}"
            raise UserError(f"{key}.{name}={file!r}: {what}")
        found[name] = read_rows(path, columns, labelled=name != "test")
    return found


def take_rows(split: AnySplit, rows: npt.NDArray[np.int64]) -> AnySplit:
    """Returns a split with these rows alone: of every field that has one value per row."""
    changed: dict[str, Any] = {}
    for field in fields(split):
        value = getattr(split, field.name)
        if isinstance(value, list):
            changed[field.name] = [value[row] for row in rows]
        elif isinstance(value, np.ndarray):
            changed[field.name] = value[rows]
    return replace(split, **changed)


def _digest(spec: TaskSpec, splits: dict[str, AnyRows]) -> str:
    digest = hashlib.sha256(json.dumps([spec.kind, spec.labels]).encode())
    for name in ("train", *spec.dev_splits):
        for field in fields(splits[name]):
            value = getattr(splits[name], field.name)
            if isinstance(value, np.ndarray):
                digest.update(value.dtype.str.encode() + value.tobytes())
            else:
                digest.update(json.dumps(value).encode())
    return digest.hexdigest()
