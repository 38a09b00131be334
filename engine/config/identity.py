"""What a run was changed in, beside what may change when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.marks import FIXED, marked_fields

FREE = frozenset(
    key
    for config in (RunConfig(), FinetuneConfig())
    for key, one in marked_fields(config)
    if one.metadata["mark"] not in FIXED
)
"""Settings that may change; checkpoints of earlier versions hold their values, too."""


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns what decides what is computed and differs, in order."""
    keys = sorted((saved.keys() | current.keys()) - FREE)
    return [key for key in keys if saved.get(key) != current.get(key)]


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns `key: saved -> current` for each of the `changed_keys`."""
    return [f"{key}: {saved.get(key)!r} -> {current.get(key)!r}" for key in changed_keys(saved, current)]
