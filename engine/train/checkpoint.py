"""Sharded checkpoints: written by DeepSpeed, and resumable only once their COMPLETE marker is there and their files are
what it says."""

from __future__ import annotations

import collections
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.deepspeed import Execution
from engine.errors import RunFailure, UserError
from engine.ranks.agreement import require_agreement
from engine.ranks.collectives import gathered
from engine.ranks.runtime import Runtime
from engine.records.files import sync_folder, write_whole
from engine.records.run_dir import COMPLETE, RunDir, step_tag, tag_step
from engine.train import universal
from engine.train.changes import accepted_changes, has_changed
from engine.train.checkpoint_files import (
    FileFacts,
    is_sound,
    problems_of,
    read_marker,
    remove_checkpoint,
    seal,
)
from engine.train.checkpoint_storage import Storage, Written
from engine.train.deepspeed_engine import DeepSpeedModel

EXPORT_FILE = "export.json"
"""Inside a checkpoint: what launch/export.py needs to rebuild the student without the training world."""


class CheckpointFailed(Exception):
    """A checkpoint could not be written, on any rank. Nothing of it is left."""


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to continue from."""

    tag: str
    conversion: universal.Conversion | None
    """Conversion that it needs when it was written with other ranks or another ZeRO stage."""
    notes: tuple[str, ...]
    """Lines about newer ones: what is wrong with them."""
    changes: tuple[str, ...] = ()
    """`key: saved -> current` of what the run was changed in, and what it goes on with."""
    global_batch: int | None = None
    """Sequences of an optimizer step up to there; None in a fine-tuning."""


@dataclass(frozen=True)
class Checkpointer:
    """The checkpoints of a run: which of them to continue from, written and loaded."""

    run_dir: RunDir
    execution: Execution
    runtime: Runtime
    identity: dict[str, Any]
    """Flat settings and input hashes that must be the same at resume."""
    keep: int
    """Number of newest checkpoints that are kept."""
    storage: Storage
    export: dict[str, Any] = field(default_factory=dict)
    """Contents of EXPORT_FILE."""
    on_error: str = "stop"
    """stop or continue, as checkpoint.on_error."""
    accept_changes: bool = False
    """Whether to continue what was changed in what it computes, as far as that can be."""

    def choose(self, resume: str, *, set_aside: bool = True) -> Chosen | None:
        """Returns the newest checkpoint whose files are what its marker says, or None for a fresh start. Renames
        damaged ones that are newer to damaged-… when `set_aside`. Raises UserError on every rank when there is none to
        continue from, and then leaves all as they are: a scheduler's next start must not begin anew. Collective.

        resume: auto, never, or the tag to continue from.
        """
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
        tags, notes = self._before_another_schedule(tags, markers)
        damaged: dict[str, str] = {}
        for tag in reversed(tags):
            sound = next((marker for marker in markers[tag].values() if marker and is_sound(marker)), None)
            changes = () if sound is None else self._changes(tag, sound["identity"])
            conversion = None if sound is None else self._conversion(tag, sound)
            problems = self._problems(tag, markers[tag])
            if not problems:
                self.storage.require_own_shards(tag, markers[tag])
                notes += [
                    note + (self._set_aside(bad) if set_aside and None not in markers[bad].values() else "")
                    for bad, note in damaged.items()
                ]
                batch = None if sound is None else sound["identity"].get("train.global_batch")
                return Chosen(tag, conversion, tuple(notes), changes, batch)
            damaged[tag] = f"{tag} is damaged: {_shown(problems)}"
        if damaged:
            remedy = f"remove {self.run_dir.checkpoints} to start anew"
            if resume != "auto":
                remedy = f"name another one ({', '.join(tag for tag in markers if tag != resume) or 'there is none'})"
            raise UserError(
                f"no checkpoint in {self.run_dir.checkpoints} can be continued: {'. '.join(damaged.values())}. Restore "
                f"the files, or {remedy}"
            )
        return None

    def has(self, step: int) -> bool:
        """Returns whether the checkpoint of a step is complete on every host. Collective."""
        complete = (self.run_dir.checkpoints / step_tag(step) / COMPLETE).is_file()
        return all(gathered(complete or not self.storage.is_keeper))

    def at(self, step: int) -> Chosen:
        """Returns the checkpoint of a step that `has` is true of. Raises RunFailure where its files are not what its
        marker says. Collective."""
        tag = step_tag(step)
        markers = self._markers()[tag]
        if problems := self._problems(tag, markers):
            raise RunFailure(f"{self.run_dir.checkpoints / tag} is damaged: {_shown(problems)}")
        marker = next(marker for marker in markers.values() if marker)
        return Chosen(tag, self._conversion(tag, marker), ())

    def _set_aside(self, tag: str) -> str:
        """Renames a damaged checkpoint; returns the end of a line that says so."""
        if self.storage.is_keeper:
            self._rename(tag, f"damaged-{tag}")
        return f"; it is now damaged-{tag}"

    def _markers(self) -> dict[str, dict[str, dict[str, Any] | None]]:
        """Returns by tag and host what COMPLETE says (an empty object when it cannot be read), and None for a host that
        has no such checkpoint. Hosts that share one folder count as one. Collective."""
        own = None
        if self.storage.is_keeper:
            own = {tag: read_marker(self.run_dir.checkpoints / tag / COMPLETE) for tag in self.run_dir.complete_tags()}
        keepers = [(host, tags) for host, tags in gathered((platform.node(), own)) if tags is not None]
        hosts = dict(keepers)
        if len(hosts) < len(keepers):
            raise UserError(
                f"checkpoint.storage=local tells hosts apart by name, and several are named "
                f"{collections.Counter(host for host, _ in keepers).most_common(1)[0][0]}; give each its own (hostname)"
            )
        return {tag: {host: hosts[host].get(tag) for host in hosts} for tag in set().union(*hosts.values())}

    def _problems(self, tag: str, markers: dict[str, dict[str, Any] | None]) -> list[str]:
        """Returns what keeps a checkpoint from being used; every host's ranks look at a share of its files.
        Collective."""
        folder = self.run_dir.checkpoints / tag
        marker = self.storage.seen(markers)
        if marker is None:
            problems = [f"{platform.node()} has no file of it"] if self.storage.is_keeper else []
        elif not is_sound(marker):
            problems = [f"{folder / COMPLETE} is unreadable"] if self.storage.is_keeper else []
        else:
            part, parts = self.storage.share
            files = {name: marker["files"][name] for name in self.storage.files(marker)}
            problems = [self.storage.where + problem for problem in problems_of(folder, files, part=part, parts=parts)]
        return [problem for of_rank in gathered(problems) for problem in of_rank]

    def _changes(self, tag: str, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns what the run was changed in since a checkpoint. saved: its identity. Raises UserError unless it may
        go on so."""
        step = tag_step(tag)
        try:
            return accepted_changes(saved, self.identity, step, accept=self.accept_changes)
        except UserError as error:
            raise UserError(f"cannot continue {tag} in {self.run_dir.root}: {error}") from None

    def _before_another_schedule(
        self, tags: Sequence[str], markers: Mapping[str, Mapping[str, dict[str, Any] | None]]
    ) -> tuple[list[str], list[str]]:
        """Returns the checkpoints from before the schedule was changed, and a line that names the others. Returns all
        of them when nothing was changed, or when there are none from before."""
        if self.accept_changes:
            return list(tags), []
        fitting = [
            tag
            for tag in tags
            if not any(
                marker and is_sound(marker) and has_changed(marker["identity"], self.identity, tag_step(tag))
                for marker in markers[tag].values()
            )
        ]
        if len(fitting) in (0, len(tags)):
            return list(tags), []
        others = [tag for tag in tags if tag not in fitting]
        return fitting, [f"{', '.join(others)}: of another schedule of the learning rate"]

    def _conversion(self, tag: str, saved: dict[str, Any]) -> universal.Conversion | None:
        """Returns the conversion that a checkpoint needs, if any. saved: its marker. Raises UserError for one that
        cannot be converted."""
        conversion = universal.plan_conversion(tag, saved=saved, execution=self.execution)
        if conversion is not None:
            self.storage.require_convertible(tag)
        return conversion

    def _rename(self, tag: str, name: str) -> None:
        """Gives a checkpoint another name, in place of what has it."""
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
        newer = [other for other in self.run_dir.complete_tags() if tag_step(other) > tag_step(tag)]
        for name in newer:
            self._rename(name, f"superseded-{name}")
        return newer

    def save(self, model: DeepSpeedModel, step: int, state: dict[str, Any]) -> Path:
        """Writes every rank's shards; COMPLETE, with the hash of every file, comes last. Collective.

        Returns the checkpoint's folder. state: what `load` gives back. `state["keep_step"]`, if there, names a
        checkpoint that is kept as well. Raises CheckpointFailed on every rank when any could not write.
        """
        tag = step_tag(step)
        folder = self.run_dir.checkpoints / tag
        if self.has(step):
            return folder
        client_state = {**state, "step": step, **universal.INFO}
        files = model.save_checkpoint(self.run_dir.checkpoints, tag, client_state)
        written = gathered(Written(platform.node(), self.runtime.rank, files.written, files.errors))
        errors = [f"{share.host}: {error}" for share in written for error in share.errors]
        if not errors:
            closing = gathered((platform.node(), self._complete(folder, step, written)))
            errors = [f"{host}: {error}" for host, error in closing if error]
        if errors:
            if self.storage.is_keeper:
                remove_checkpoint(folder)
            gathered(None)  # nobody writes there again before it is gone
            raise CheckpointFailed(f"checkpoint {tag} could not be written ({'; '.join(dict.fromkeys(errors))})")
        if self.storage.is_keeper:
            self._write_latest(tag)
            for old in self.run_dir.complete_tags()[: -self.keep]:
                if tag_step(old) != state.get("keep_step"):
                    remove_checkpoint(self.run_dir.checkpoints / old)
        return folder

    def _complete(self, folder: Path, step: int, written: Sequence[Written]) -> str | None:
        """Writes what makes the checkpoint complete, on keepers; returns what went wrong. Every host's marker lists the
        files of all, so that those of several disks can be brought together in one folder, and be checked there."""
        if not self.storage.is_keeper:
            return None
        if (mistaken := self.storage.mistaken(folder, written)) is not None:
            return mistaken
        description = json.dumps({**self.export, "step": step}, indent=1).encode()
        mine = self.storage.in_this_folder(written)
        on_this_host = {name: facts for share in mine for name, facts in share.files.items()}
        on_this_host[EXPORT_FILE] = FileFacts.of(description)
        everywhere = {name: facts for share in written for name, facts in share.files.items()} | on_this_host
        marker = {
            "step": step,
            **self.execution.facts,
            "layout": self.execution.layout,
            "ranks": [share.rank for share in mine],
            "on_this_host": sorted(on_this_host),
            "files": {name: facts.as_json() for name, facts in everywhere.items()},
            "identity": self.identity,
        }
        try:
            write_whole(folder / EXPORT_FILE, description)
            sync_folder(folder.parent)
            write_whole(folder / COMPLETE, json.dumps({**marker, "sha256": seal(marker)}, indent=1).encode())
        except OSError as error:
            return str(error)
        return None

    def _write_latest(self, tag: str) -> None:
        """Writes the name of the newest checkpoint for DeepSpeed's own tools (zero_to_fp32.py); nothing here reads
        it."""
        try:
            write_whole(self.run_dir.checkpoints / "latest", tag.encode())
        except OSError:
            return

    def load(self, model: DeepSpeedModel, chosen: Chosen) -> dict[str, Any]:
        """Restores weights, projections, optimizer, schedule and scaler; returns the saved state, with its `step`.
        Raises UserError where DeepSpeed finds nothing or a conversion fails. Collective."""
        if chosen.conversion is not None:
            return universal.load(
                model, self.run_dir.checkpoints, chosen.conversion, is_rank_zero=self.runtime.is_rank_zero
            )
        state = model.load_checkpoint(self.run_dir.checkpoints, chosen.tag)
        if state is None:
            raise UserError(
                f"{self.run_dir.checkpoints / chosen.tag}: DeepSpeed finds no checkpoint there, though its files are "
                "whole; go back to another one with resume=step-…"
            )
        return state


def _shown(problems: Sequence[str]) -> str:
    """Returns the first of them in one line."""
    return "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
