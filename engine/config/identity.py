"""What a run was changed in, beside what may change when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.distill import LOSS_NAMES, RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.marks import FIXED, marked_fields

FREE = frozenset(
    key
    for config in (RunConfig(), FinetuneConfig())
    for key, one in marked_fields(config)
    if one.metadata["mark"] not in FIXED
)
"""Settings that may change; checkpoints of earlier versions hold their values, too."""
OF_SCHEDULE = {f"train.{name}": name for name in ("steps", "lr", "schedule", "warmup_steps", "decay_share")}
"""Names of TrainConfig's fields that decide the learning rates, by their keys in a run's identity."""
_ADJUSTABLE = frozenset(
    {
        *OF_SCHEDULE,
        *(f"train.{name}" for name in ("global_batch", "grad_clip")),
        *(f"data.{name}" for name in ("content_sha256", "eval_sequences", "group_by_length", "whole_word_mask")),
        "loss.temperature",
    }
)
"""Settings that a run can go on with when they are changed."""
_WEIGHTS = frozenset({*(f"loss.{name}" for name in LOSS_NAMES), "data.mlm_probability"})
"""Settings that it can, unless they were 0 or become 0: that decides which parameters there are."""


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns what decides what is computed and differs, in order."""
    keys = sorted((saved.keys() | current.keys()) - FREE)
    return [key for key in keys if saved.get(key) != current.get(key)]


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns `key: saved -> current` for each of the `changed_keys`."""
    return [f"{key}: {saved.get(key)!r} -> {current.get(key)!r}" for key in changed_keys(saved, current)]


def fixed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns those of the `changed_keys` that a run cannot go on with: the model, its parameters or its optimizer
    would be others."""
    return [
        key
        for key in changed_keys(saved, current)
        if key not in _ADJUSTABLE and not (key in _WEIGHTS and saved.get(key) and current.get(key))
    ]
