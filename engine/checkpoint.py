"""Sharded checkpoints: written by DeepSpeed, and resumable only once their COMPLETE marker is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.ds_config import Execution
from engine.errors import UserError
from engine.run_dir import COMPLETE, RunDir, step_tag, tag_step

EXPORT_FILE = "export.json"
"""Inside a checkpoint: what launch/export.py needs to rebuild the student without the training world."""

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
        "data.seq_len",
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


def _flush(folder: Path) -> None:
    """Makes the disk hold what was written: after a power loss COMPLETE must not stand beside empty shards."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # another rank may be renaming its own
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Checkpointer:
    run_dir: RunDir
    execution: Execution
    identity: dict[str, Any]
    """Flat settings and input hashes that must be the same at resume."""
    export: dict[str, Any]
    """Contents of EXPORT_FILE."""
    keep: int
    is_rank_zero: bool

    def choose(self, resume: str) -> str | None:
        """The tag to continue from, or None for a fresh start. Raises UserError when that cannot be right."""
        tags = self.run_dir.complete_tags()
        if resume == "never":
            if tags:
                raise UserError(
                    f"resume='never', but {self.run_dir.checkpoints} holds {tags[-1]}; name another output_dir, remove "
                    "that folder, or write resume=auto"
                )
            return None
        if resume != "auto":
            if resume not in tags:
                known = ", ".join(tags) or "none"
                raise UserError(f"resume={resume!r}: no complete checkpoint of that name; complete ones: {known}")
            chosen = resume
        elif tags:
            chosen = tags[-1]
        else:
            return None
        self._check(chosen)
        return chosen

    def _check(self, tag: str) -> None:
        marker = self.run_dir.checkpoints / tag / COMPLETE
        try:
            saved = json.loads(marker.read_text(encoding="utf-8"))
            identity = saved["identity"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            raise UserError(f"{marker}: unreadable; remove the folder {tag} to continue from the one before") from None
        changes = changed_keys(identity, self.identity)
        if changes:
            raise UserError(
                f"cannot continue {tag} in {self.run_dir.root}: the run was changed in what it computes "
                f"({'; '.join(changes)}). Restore these values, or name another output_dir"
            )
        for key, value in self.execution.facts.items():
            if saved[key] != value:
                raise UserError(
                    f"cannot continue {tag}: it was written with {key}={saved[key]} and this start has {key}={value}; "
                    "start with the same ranks, ZeRO stage and precision (micro batch and accumulation may change)"
                )

    def clean(self) -> list[str]:
        """Removes what killed writers left (folders without COMPLETE); returns their names. Rank 0 only."""
        complete = set(self.run_dir.complete_tags())
        removed = []
        for folder in sorted(self.run_dir.checkpoints.glob("step-*")):
            if folder.is_dir() and folder.name not in complete:
                shutil.rmtree(folder)
                removed.append(folder.name)
        return removed

    def set_aside_after(self, tag: str) -> list[str]:
        """Renames complete checkpoints newer than `tag` to superseded-…: they belong to a future that is being run
        again, and must neither be chosen nor overwritten. Rank 0 only."""
        newer = [t for t in self.run_dir.complete_tags() if tag_step(t) > tag_step(tag)]
        for name in newer:
            target = self.run_dir.checkpoints / f"superseded-{name}"
            if target.exists():
                shutil.rmtree(target)
            (self.run_dir.checkpoints / name).rename(target)
        return newer

    def save(self, ds_engine: Any, step: int, state: dict[str, Any]) -> Path:
        """Collective. Every rank writes its shards; COMPLETE comes last, after a barrier.

        state: what `load` gives back. `state["best_step"]`, if there, names a checkpoint that is kept as well.
        """
        tag = step_tag(step)
        folder = self.run_dir.checkpoints / tag
        if (folder / COMPLETE).is_file():
            return folder
        ds_engine.save_checkpoint(str(self.run_dir.checkpoints), tag=tag, client_state={**state, "step": step})
        _flush(folder)
        torch.distributed.barrier()
        if self.is_rank_zero:
            (folder / EXPORT_FILE).write_text(json.dumps({**self.export, "step": step}, indent=1), encoding="utf-8")
            marker = {"step": step, **self.execution.facts, "identity": self.identity}
            pending = folder / f"{COMPLETE}.part"
            pending.write_text(json.dumps(marker, indent=1), encoding="utf-8")
            pending.replace(folder / COMPLETE)
            for old in self.run_dir.complete_tags()[: -self.keep]:
                if tag_step(old) != state.get("best_step"):
                    self._remove(old)
        torch.distributed.barrier()
        return folder

    def _remove(self, tag: str) -> None:
        folder = self.run_dir.checkpoints / tag
        (folder / COMPLETE).unlink()  # first, so that a half-removed folder never looks whole
        shutil.rmtree(folder)

    def load(self, ds_engine: Any, tag: str) -> dict[str, Any]:
        """Collective. Restores model, projections, optimizer, schedule and scaler; returns the saved state, with its
        `step`."""
        path, client_state = ds_engine.load_checkpoint(str(self.run_dir.checkpoints), tag=tag)
        if path is None:
            raise UserError(f"{self.run_dir.checkpoints / tag}: DeepSpeed could not load this checkpoint")
        return dict(client_state)
