"""What the tests of tasks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.finetune import TaskDataConfig
from engine.errors import UserError
from engine.tasks.load import TaskData
from engine.tasks.rows import Split


def config_of(folder: Path | None, **settings: object) -> TaskDataConfig:
    return TaskDataConfig(data_dir=None if folder is None else str(folder), **settings)  # type: ignore[arg-type]


def rows_of(data: TaskData, name: str) -> Split:
    split = data.splits[name]
    assert isinstance(split, Split)
    assert split.name == name
    assert len(split.first) == len(split.ids)
    assert split.second is None or len(split.second) == len(split.first)
    assert split.labels is None or len(split.labels) == len(split.first)
    return split


def check_error(words: str | list[str], call: Callable[[], object]) -> None:
    """The call raises a UserError of one line that has all of these in it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in [words] if isinstance(words, str) else words:
        assert word in message, f"{word!r} is not in: {message}"
