"""What a run computes, as flat settings and hashes: the same when it is continued, and the same on all ranks."""

from __future__ import annotations

import platform
from typing import Any

from engine.collectives import from_rank_zero, gathered
from engine.errors import UserError

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


def require_agreement(mine: dict[str, Any]) -> None:
    """Collective. Raises UserError when some rank would compute something else: hosts may have models and corpora on
    disks of their own, and different processors. mine: flat settings and hashes of inputs."""
    first = from_rank_zero(lambda: mine)
    differing = {host: found for host, found in gathered((platform.node(), changed_keys(first, mine))) if found}
    if differing:
        raise UserError(
            "ranks would not compute the same ("
            + "; ".join(f"{host}: {', '.join(found[:4])}" for host, found in differing.items())
            + "). Bring the same files to these hosts, or name the same deepspeed_config"
        )
