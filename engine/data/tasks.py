"""Loading a task: names as the user writes them, official folders, the hub, the user's own files, and the row caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from engine.data.task_specs import (
    GLUE_TASKS,
    Kind,
    TaskDefaults,
    TaskSpec,
    check_custom_names,
    plain,
    spec_of,
)
from engine.errors import UserError
from engine.task_config import TaskDataConfig

if TYPE_CHECKING:
    from engine.data.squad import SquadSplit

__all__ = [
    "GLUE_TASKS",
    "Kind",
    "Split",
    "TaskData",
    "TaskDefaults",
    "TaskSpec",
    "load_task",
    "resolve_names",
    "task_spec",
]

Labels = npt.NDArray[np.int64] | npt.NDArray[np.float32]
AnySplit = TypeVar("AnySplit", bound="Split | SquadSplit")
_SQUAD_FILES = {"SQuAD-v1.1": "{}-v1.1.json", "SQuAD-v2": "{}-v2.0.json"}
_SQUAD_HUB = {"SQuAD-v1.1": "rajpurkar/squad", "SQuAD-v2": "rajpurkar/squad_v2"}


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


@dataclass(frozen=True)
class TaskData:
    spec: TaskSpec
    splits: dict[str, Split | SquadSplit]
    sha256: str
    """Over the rows, after task.train_rows and task.dev_rows: the same for two runs that see the same rows."""
    warnings: tuple[str, ...] = ()
    """What was left out of the files, for the banner."""


def resolve_names(names: Sequence[str], config: TaskDataConfig) -> tuple[list[str], list[str]]:
    """The tasks to run by official spelling, each once and in the order of `names`; and the GLUE tasks that `glue`
    stands for but that task.data_dir has no folder of. A task that is named itself is never left out."""
    check_custom_names(config)
    chosen: dict[str, None] = {}
    absent: list[str] = []
    for name in names:
        if plain(name) != "glue":
            chosen[spec_of(name, config).name] = None
            continue
        there = [
            task for task in GLUE_TASKS if config.data_dir is None or _task_folder(task, _root(config)) is not None
        ]
        if not there:
            raise UserError(f"task {name!r}: task.data_dir={config.data_dir!r} has no folder of a GLUE task; add some")
        chosen |= dict.fromkeys(there)
        absent = [task for task in GLUE_TASKS if task not in there]
    return list(chosen), [task for task in absent if task not in chosen]


def task_spec(name: str, config: TaskDataConfig) -> TaskSpec:
    """The task of this name in any spelling. A custom classification without `labels` has none here; the spec of
    load_task's result is the final one. Raises UserError."""
    return spec_of(name, config)


def load_task(name: str, config: TaskDataConfig, *, test: bool = False) -> TaskData:
    """Reads train, dev and (with `test`) test splits, and caps their rows; heavy for the big tasks, so once per process.

    task.train_rows draws rows at random, always the same ones and a part of those that a larger cap draws, in the
    order of the file; task.dev_rows takes the first. Test splits are never capped, and absent ones are left out unless
    the user named the file. Raises UserError that names the file and line, or the setting.
    """
    spec = spec_of(name, config)
    if spec.name in config.custom:
        spec, splits, warnings = _load_custom(spec, config, test=test)
    elif spec.kind == "span":
        splits, warnings = _load_squad(spec, config), ()
    else:
        splits, warnings = _load_glue(spec, config, test=test)
    if config.train_rows is not None and config.train_rows < len(splits["train"].ids):
        drawn = np.random.default_rng(0).permutation(len(splits["train"].ids))[: config.train_rows]
        splits["train"] = _take(splits["train"], np.sort(drawn))
    for split in spec.dev_splits if config.dev_rows is not None else ():
        splits[split] = _take(splits[split], np.arange(min(config.dev_rows, len(splits[split].ids))))
    return TaskData(spec, splits, _digest(spec, splits), warnings)
