"""What each setting decides: a mark on every field. What a run, a fine-tuning, a fitness and a search have in common
with what they continue, or are compared with, is derived from the marks, and so is what may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Annotated, Any

from engine.records.fingerprints import flatten


class Mark(StrEnum):
    RESULT = "result"
    """Decides what is computed: fixed when it is continued, and part of a proxy's fingerprint."""
    EVALUATION = "evaluation"
    """Tells evaluations of one fingerprint apart (seeds, steps that report): fixed when it is continued."""
    INPUT = "input"
    """Says where something lies that is read: free to change, since a hash of what was read stands for it."""
    HOW = "how"
    """Says how it is computed, kept or shown, up to rounding: free to change."""


PathText = Annotated[str, "path"]
"""Type of a setting that is a path, or a name on the hub: `~` in it stands for the home folder."""

FIXED = (Mark.RESULT, Mark.EVALUATION)
"""Marks of what must be the same when something is continued."""


def marked(mark: Mark, default: Any = MISSING, *, factory: Any = MISSING, teacher: bool = False) -> Any:
    """Returns a dataclass field with a mark; without `default` and `factory` it is required. teacher: the setting
    changes bits of what the teacher captures, so that the teacher cache keeps its values apart."""
    metadata = {"mark": mark, "teacher": teacher}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def result(default: Any = MISSING, *, factory: Any = MISSING, teacher: bool = False) -> Any:
    return marked(Mark.RESULT, default, factory=factory, teacher=teacher)


def evaluation(default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    return marked(Mark.EVALUATION, default, factory=factory)


def located(default: Any = MISSING, *, factory: Any = MISSING, teacher: bool = False) -> Any:
    return marked(Mark.INPUT, default, factory=factory, teacher=teacher)


def how(default: Any = MISSING, *, factory: Any = MISSING, teacher: bool = False) -> Any:
    return marked(Mark.HOW, default, factory=factory, teacher=teacher)


def marked_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yields (`section.name`, field) of every setting of a configuration, in the order of its source."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from marked_fields(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", one


def settings(config: Any, *marks: Mark) -> dict[str, Any]:
    """Returns the values with one of these marks as {"section.name": value}; a dict as one entry for each of its keys.
    Raises KeyError for a setting without a mark."""
    return flatten(
        {key: attrgetter(key)(config) for key, one in marked_fields(config) if one.metadata["mark"] in marks}
    )


def teacher_settings(config: Any) -> list[str]:
    """Returns the keys of the settings that change bits of what the teacher captures."""
    return [key for key, one in marked_fields(config) if one.metadata["teacher"]]
