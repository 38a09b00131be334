"""The name of every file in a run directory, and the rules of which checkpoints count."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from engine.errors import UserError, first_line

COMPLETE = "COMPLETE"
EVENT_FILES = "events.out.tfevents."
"""Beginning of the names of TensorBoard's files."""
HELD_OUT = "held_out"
"""Folder of TensorBoard's files of held-out losses: a run beside that of training, so that one chart shows both."""
_JOBS = {
    "checkpoint": "launch/distill.py",
    "model": "launch/finetune.py",
    "genomes": "launch/proxy.py",
    "search": "launch/search.py",
}
"""Names at the top level of a config.yaml, and the one script that has them."""
_TAG = re.compile(r"^step-(\d{8,})$")


def step_tag(step: int) -> str:
    """Returns `step-00000100`: the checkpoint folder (DeepSpeed calls it the tag) of optimizer step `step`."""
    return f"step-{step:08d}"


def is_tag(name: str) -> bool:
    return _TAG.match(name) is not None


def tag_step(tag: str) -> int:
    """Returns the optimizer step of a tag. Raises ValueError for anything that is not one."""
    match = _TAG.match(tag)
    if match is None:
        raise ValueError(f"{tag!r} is not a checkpoint name; it should look like {step_tag(100)!r}")
    return int(match.group(1))


def as_yaml(config: Any) -> str:
    """Returns a configuration dataclass as the YAML that `--config` reads, in the order of its fields."""
    text: str = yaml.safe_dump(asdict(config), sort_keys=False)
    return text


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def save_pretrained(self, save_directory: Path, /) -> Any: ...


@dataclass(frozen=True)
class RunDir:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def ds_config(self) -> Path:
        return self.root / "ds_config.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's files: its page names a run as its folder, so that it is the run directory itself;
        where an earlier version began the run in a folder of its own, that one."""
        old = self.root / "tensorboard"
        return old if old.is_dir() else self.root

    @property
    def csv(self) -> Path:
        """Folder of the files that `csv_monitor` of a DeepSpeed file asks for."""
        return self.root / "csv"

    @property
    def records(self) -> Path:
        return self.root / "records.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def model(self) -> Path:
        """Folder that a fine-tuning exports to; `student` is a distillation's."""
        return self.root / "model"

    def require_no_patterns(self) -> None:
        """Raises UserError for a name under which DeepSpeed would not find its own checkpoints: it looks by pattern."""
        found = [character for character in "*?[" if character in str(self.root)]
        if found:
            raise UserError(
                f"run directory {str(self.root)!r}: DeepSpeed cannot find checkpoints below a folder with "
                f"{' '.join(found)} in its name; name (or move it to) another"
            )

    def write_settings(
        self,
        config: Any,
        *,
        ds_config: dict[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        beside_tokenizer: Callable[[Path], None] | None = None,
    ) -> None:
        """Makes the folder and writes the resolved configuration, and what else is given (`beside_tokenizer` adds files
        that exports take along with the tokenizer's). For rank 0, through
        collectives.from_rank_zero where others wait for it. Raises UserError, too, where another script has a run."""
        own = next((script for name, script in _JOBS.items() if hasattr(config, name)), None)
        if (other := self._writing_script()) not in (None, own):
            raise UserError(f"output_dir={str(self.root)!r} holds what {other} has written; name another folder")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.config.write_text(as_yaml(config), encoding="utf-8")
            if ds_config is not None:
                self.ds_config.write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                try:
                    tokenizer.save_pretrained(self.tokenizer)
                except Exception as error:  # until tokenizers > 0.23.3: it has no other for a full disk
                    raise OSError(first_line(error)) from None
            if beside_tokenizer is not None:
                beside_tokenizer(self.tokenizer)
        except OSError as error:
            raise UserError(
                f"output_dir={str(self.root)!r} cannot be written: {error}; make room or get the permission there, or "
                "name another folder"
            ) from None

    def _writing_script(self) -> str | None:
        """Returns the script that has written a configuration here; None where there is none, or it is not known."""
        try:
            text = self.config.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return next((script for name, script in _JOBS.items() if re.search(rf"^{name}:", text, re.MULTILINE)), None)

    def set_aside_logs(self) -> list[tuple[Path, Path]]:
        """Renames records and curves of an earlier run in this folder to superseded-…, so that its result is not taken
        for the next one's. Returns their old and new paths; one pattern stands for all of TensorBoard's files."""
        moved = []
        old = [self.tensorboard] if self.tensorboard != self.root else []
        for path in (self.records, self.csv, *old):
            if path.exists():
                moved.append((path, path.rename(self._superseded(path.name))))
        events = self.root / f"{EVENT_FILES}*"
        if files := [*self.root.glob(events.name), *self.root.glob(HELD_OUT)]:
            folder = self._superseded("tensorboard")
            folder.mkdir()
            for path in files:
                path.rename(folder / path.name)
            moved.append((events, folder))
        return moved

    def _superseded(self, name: str) -> Path:
        """Returns the first free name for what an earlier run has left."""
        names = itertools.chain([f"superseded-{name}"], (f"superseded-{n}-{name}" for n in itertools.count(2)))
        return next(path for path in map(self.root.joinpath, names) if not path.exists())

    def complete_tags(self) -> list[str]:
        """Lists the tags that hold a COMPLETE marker, oldest first; the others are what killed writers left."""
        if not self.checkpoints.is_dir():
            return []
        found = [
            entry.name for entry in self.checkpoints.iterdir() if is_tag(entry.name) and (entry / COMPLETE).is_file()
        ]
        return sorted(found, key=tag_step)
