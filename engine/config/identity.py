"""What a run was changed in, beside what may change when it is continued."""

from __future__ import annotations

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


def changed_keys(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Returns `key: saved -> current` for everything that decides what is computed and differs."""
    keys = sorted((saved.keys() | current.keys()) - FREE)
    return [f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k)]
