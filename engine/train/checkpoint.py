"""Sharded checkpoints: written by DeepSpeed, and resumable only once their COMPLETE marker is there and their files are
what it says."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.deepspeed import Execution
from engine.config.identity import changed_keys
from engine.errors import UserError
from engine.ranks.agreement import require_agreement
from engine.ranks.collectives import gathered
from engine.ranks.runtime import Runtime
from engine.records.files import sync_folder, write_whole
from engine.records.run_dir import COMPLETE, RunDir, step_tag, tag_step
from engine.train import universal
from engine.train.checkpoint_files import (
    FileFacts,
    is_sound,
    problems_of,
    read_marker,
    remove_folder,
    seal,
)
from engine.train.deepspeed_engine import DeepSpeedModel

SEEN_WITHIN_S = 40.0
"""Longer than an NFS client keeps what it knows of a folder (acdirmin, 30 s)."""
EXPORT_FILE = "export.json"
"""Inside a checkpoint: what launch/export.py needs to rebuild the student without the training world."""


class CheckpointFailed(Exception):
    """A checkpoint could not be written, on any rank. Nothing of it is left."""


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to continue from."""

    tag: str
    conversion: universal.Conversion | None
    """When it was written with other ranks or another ZeRO stage."""
    notes: tuple[str, ...]
    """What was wrong with newer ones."""


@dataclass(frozen=True)
class Checkpointer:
    run_dir: RunDir
    execution: Execution
    here: Runtime
    identity: dict[str, Any]
    """Flat settings and input hashes that must be the same at resume."""
    keep: int
    export: dict[str, Any] = field(default_factory=dict)
    """Contents of EXPORT_FILE."""
    storage: str = "shared"
    """shared or local, as checkpoint.storage."""
    on_error: str = "stop"
    """stop or continue, as checkpoint.on_error."""

    @property
    def is_keeper(self) -> bool:
        """Whether this rank looks after the folder that it sees: on every host where each has its own."""
        return self.here.local_rank == 0 if self.storage == "local" else self.here.is_rank_zero

    def choose(self, resume: str, *, set_aside: bool = True) -> Chosen | None:
        """Collective. The newest checkpoint whose files are what its marker says, or None for a fresh start. Damaged
        ones that are newer are renamed to damaged-… when `set_aside`. Raises UserError when there is none to continue
        from, and then leaves all as they are: a scheduler's next start must not begin anew."""
        require_agreement({**self.identity, **self.execution.facts, **self.execution.layout})
        markers = self._markers()
        tags = sorted(markers, key=tag_step)
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
            tags = [resume]
        damaged: dict[str, str] = {}
        for tag in reversed(tags):
            sound = next((marker for marker in markers[tag].values() if marker and is_sound(marker)), None)
            conversion = None if sound is None else self._check(tag, sound)
            problems = self._problems(tag, markers[tag])
            if not problems:
                if self.storage == "local":
                    self._require_own_shards(tag, markers[tag])
                notes = [
                    note + (self._set_aside(bad) if set_aside and None not in markers[bad].values() else "")
                    for bad, note in damaged.items()
                ]
                return Chosen(tag, conversion, tuple(notes))
            shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
            damaged[tag] = f"{tag} is damaged: {shown}"
        if damaged:
            otherwise = f"remove {self.run_dir.checkpoints} to start anew"
            if resume != "auto":
                otherwise = (
                    f"name another one ({', '.join(tag for tag in markers if tag != resume) or 'there is none'})"
                )
            raise UserError(
                f"no checkpoint in {self.run_dir.checkpoints} can be continued: {'. '.join(damaged.values())}. Restore "
                f"the files, or {otherwise}"
            )
        return None

    def _set_aside(self, tag: str) -> str:
        if self.is_keeper:
            self._rename(tag, f"damaged-{tag}")
        return f"; it is now damaged-{tag}"

    def _markers(self) -> dict[str, dict[str, dict[str, Any] | None]]:
        """Collective. By tag and host, what COMPLETE says (an empty object when it cannot be read); None on a host that
        has no such checkpoint. Hosts that share one folder count as one."""
        found = None
        if self.is_keeper:
            found = {
                tag: read_marker(self.run_dir.checkpoints / tag / COMPLETE) for tag in self.run_dir.complete_tags()
            }
        keepers = [(host, tags) for host, tags in gathered((platform.node(), found)) if tags is not None]
        hosts = dict(keepers)
        if len(hosts) < len(keepers):
            raise UserError(
                f"checkpoint.storage=local tells hosts apart by name, and several are named "
                f"{collections.Counter(host for host, _ in keepers).most_common(1)[0][0]}; give each its own (hostname)"
            )
        return {tag: {host: hosts[host].get(tag) for host in hosts} for tag in set().union(*hosts.values())}

    def _problems(self, tag: str, markers: dict[str, dict[str, Any] | None]) -> list[str]:
        """Collective. What keeps a checkpoint from being used; every host's ranks look at a share of its files."""
        folder, host = self.run_dir.checkpoints / tag, platform.node()
        local = self.storage == "local"
        seen = markers.get(host) if local else next(iter(markers.values()))
        part, parts = (self.here.local_rank, self.here.local_size) if local else (self.here.rank, self.here.world_size)
        problems = []
        if seen is None:
            problems = [f"{host} has nothing of it"] if self.is_keeper else []
        elif not is_sound(seen):
            problems = [f"{folder / COMPLETE} is unreadable"] if self.is_keeper else []
        else:
            where = f"{host}: " if local else ""
            files = {name: seen["files"][name] for name in (seen["on_this_host"] if local else seen["files"])}
            problems = [where + problem for problem in problems_of(folder, files, part=part, parts=parts)]
        return [problem for found in gathered(problems) for problem in found]

    def _require_own_shards(self, tag: str, markers: dict[str, dict[str, Any] | None]) -> None:
        """Collective. Raises UserError when hosts that keep shards to themselves run other ranks now."""
        kept = (markers.get(platform.node()) or {}).get("ranks", ())
        told = f"{platform.node()} keeps ranks {kept} and runs rank {self.here.rank} now"
        misplaced = [text for text in gathered(told if self.here.rank not in kept else None) if text is not None]
        if misplaced:
            raise UserError(
                f"cannot continue {tag}: with checkpoint.storage=local shards stay where they were written, but "
                f"{'; '.join(misplaced[:4])}. Restore the order of the hosts, or copy all shards into one shared "
                "output_dir and set checkpoint.storage=shared"
            )

    def _check(self, tag: str, saved: dict[str, Any]) -> universal.Conversion | None:
        changes = changed_keys(saved["identity"], self.identity)
        if changes:
            raise UserError(
                f"cannot continue {tag} in {self.run_dir.root}: the run was changed in what it computes "
                f"({'; '.join(changes)}). Restore these values, or name another output_dir"
            )
        return universal.plan_conversion(tag, saved=saved, execution=self.execution, storage=self.storage)

    def _rename(self, tag: str, name: str) -> None:
        target = self.run_dir.checkpoints / name
        if target.exists():
            shutil.rmtree(target)
        (self.run_dir.checkpoints / tag).rename(target)

    def clean(self) -> list[str]:
        """Removes what killed writers left (folders without COMPLETE, conversions); returns their names. For
        keepers."""
        complete = set(self.run_dir.complete_tags())
        removed = []
        for folder in sorted(self.run_dir.checkpoints.glob("*step-*")):
            is_remains = folder.name.startswith(("step-", universal.PREFIX)) and folder.name not in complete
            if folder.is_dir() and is_remains:
                shutil.rmtree(folder)
                removed.append(folder.name)
        return removed

    def set_aside_after(self, tag: str) -> list[str]:
        """Renames complete checkpoints newer than `tag` to superseded-…: they belong to a future that is being run
        again, and must neither be chosen nor overwritten. For keepers."""
        newer = [t for t in self.run_dir.complete_tags() if tag_step(t) > tag_step(tag)]
        for name in newer:
            self._rename(name, f"superseded-{name}")
        return newer

    def save(self, model: DeepSpeedModel, step: int, state: dict[str, Any]) -> Path:
        """Writes every rank's shards; COMPLETE, with the hash of every file, comes last. Collective.

        state: what `load` gives back. `state["best_step"]`, if there, names a checkpoint that is kept as well. Raises
        CheckpointFailed on every rank when any could not write.
        """
        tag = step_tag(step)
        folder = self.run_dir.checkpoints / tag
        if all(gathered((folder / COMPLETE).is_file() or not self.is_keeper)):
            return folder
        client_state = {**state, "step": step, **universal.INFO}
        files = model.save_checkpoint(self.run_dir.checkpoints, tag, client_state)
        told = gathered((platform.node(), self.here.rank, files.written, files.errors))
        errors = [f"{host}: {error}" for host, _, _, found in told for error in found]
        if not errors:
            errors = [error for error in gathered(self._complete(folder, step, told)) if error]
        if errors:
            if self.is_keeper:
                remove_folder(folder, COMPLETE)
            gathered(None)  # nobody writes there again before it is gone
            raise CheckpointFailed(f"checkpoint {tag} could not be written ({'; '.join(dict.fromkeys(errors))})")
        if self.is_keeper:
            self._write_latest(tag)
            for old in self.run_dir.complete_tags()[: -self.keep]:
                if tag_step(old) != state.get("best_step"):
                    remove_folder(self.run_dir.checkpoints / old, COMPLETE)
        return folder

    def _complete(self, folder: Path, step: int, told: list[tuple[str, int, dict[str, FileFacts], Any]]) -> str | None:
        """Writes what makes the checkpoint complete, on keepers; returns what went wrong. Every host's marker lists the
        files of all, so that those of several disks can be brought together in one folder, and be checked there."""
        if not self.is_keeper:
            return None
        description = json.dumps({**self.export, "step": step}, indent=1).encode()
        mine = [one for one in told if self.storage == "shared" or one[0] == platform.node()]
        on_this_host = {name: facts for _, _, files, _ in mine for name, facts in files.items()}
        on_this_host[EXPORT_FILE] = FileFacts.of(description)
        written = {name: facts for _, _, files, _ in told for name, facts in files.items()} | on_this_host
        marker = {
            "step": step,
            **self.execution.facts,
            "layout": self.execution.layout,
            "ranks": [rank for _, rank, _, _ in mine],
            "on_this_host": sorted(on_this_host),
            "files": {name: facts.as_json() for name, facts in written.items()},
            "identity": self.identity,
        }
        of_others = [name for name in written if name not in on_this_host]
        if any((folder / name).exists() for name in of_others):
            return (
                f"{platform.node()}: {of_others[0]}, which another host wrote, is here too: the hosts share "
                "output_dir. Set checkpoint.storage=shared"
            )
        if self.storage == "shared":
            unseen = _not_seen(folder, {name: facts for _, _, files, _ in told for name, facts in files.items()})
            if unseen:
                return (
                    f"{platform.node()}: {', '.join(unseen[:4])}, which other ranks wrote, cannot be seen here: the "
                    "hosts do not share output_dir. Name a folder that they share, or set checkpoint.storage=local"
                )
        try:
            write_whole(folder / EXPORT_FILE, description)
            sync_folder(folder.parent)
            write_whole(folder / COMPLETE, json.dumps({**marker, "sha256": seal(marker)}, indent=1).encode())
        except OSError as error:
            return f"{platform.node()}: {error}"
        return None

    def _write_latest(self, tag: str) -> None:
        """For DeepSpeed's own tools (zero_to_fp32.py); nothing here reads it."""
        try:
            write_whole(self.run_dir.checkpoints / "latest", tag.encode())
        except OSError:
            return

    def load(self, model: DeepSpeedModel, chosen: Chosen) -> dict[str, Any]:
        """Restores weights, projections, optimizer, schedule and scaler; returns the saved state, with its `step`.
        Collective."""
        if chosen.conversion is not None:
            return universal.load(
                model, self.run_dir.checkpoints, chosen.conversion, is_rank_zero=self.here.is_rank_zero
            )
        state = model.load_checkpoint(self.run_dir.checkpoints, chosen.tag)
        if state is None:
            raise UserError(
                f"{self.run_dir.checkpoints / chosen.tag}: DeepSpeed finds no checkpoint there, though its files are "
                "whole; go back to another one with resume=step-…"
            )
        return state


def _not_seen(folder: Path, written: dict[str, FileFacts]) -> list[str]:
    """The files that do not come into sight in their full size. Network file systems show those of other hosts late."""
    until = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes NFS ask its server again
        sizes = {name: _size(folder / name) for name in written}
        unseen = [name for name, facts in written.items() if sizes[name] != facts.size]
        if not unseen or time.monotonic() > until:
            return unseen
        time.sleep(0.5)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
