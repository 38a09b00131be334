"""What a run computes, as flat settings and hashes. No torch here."""

from __future__ import annotations

import hashlib
import json
from typing import Any

HOW_KEYS = frozenset(
    [
        "output_dir",
        "resume",
        "deepspeed_config",
        "dry_run",
        "require_fused",
        "teacher.placement",
        "teacher.attention",
        "student.attention",
        "student.activation_checkpointing",
        "student.fused_layer_norm",
        "kernels.backend",
        "kernels.attention",
        "kernels.gram_sums",
        "kernels.unpadded",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep",
        "train.hang_timeout_s",
        "train.skip_bad_steps",
        "checkpoint.storage",
        "checkpoint.on_error",
        # where they lie; what they hold is in the identity, as hashes
        "teacher.path",
        "data.path",
        "data.seq_len",
        "data.verify",
        "allow_pickle",
    ]
)
"""Settings that say how a run executes or reports; every other one says what it computes and is fixed at resume."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changed_keys(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """`key: saved -> current` for everything that decides what is computed and differs."""
    keys = sorted((saved.keys() | current.keys()) - HOW_KEYS)
    return [f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k)]


def digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]
