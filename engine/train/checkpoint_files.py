"""The files of a sharded checkpoint: written, flushed and hashed as DeepSpeed hands them over, and compared at
resume; and the marker that lists them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from engine.errors import first_line
from engine.records.run_dir import COMPLETE

_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """Size and hash that a file of a checkpoint must have."""

    size: int
    """Bytes."""
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileFacts:
        """Returns the facts of a file with these contents."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def as_json(self) -> dict[str, Any]:
        """Returns what a marker holds of the file."""
        return asdict(self)


class _Hashed:
    """A file that hashes what is written to it, so that the disk's contents can be compared with it later."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size += len(view)
        self._file.write(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self._size, self._digest.hexdigest())


class CheckedFiles:
    """A checkpoint engine in the place of DeepSpeed's own while a checkpoint is written.

    DeepSpeed's own raises in the middle of collective work when a disk is full, and the other ranks wait for ever. This
    one remembers the error, so that all ranks come to the end, where they can agree that there is no checkpoint.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.written: dict[str, FileFacts] = {}
        """Facts of the files of this rank, by name."""
        self.errors: list[str] = []
        """Errors that this rank has met, each with its file."""

    @contextmanager
    def in_place_of(self, ds_engine: Any) -> Iterator[None]:
        """Takes the checkpoint engine's place inside of the block, and remembers also what goes wrong with the recovery
        scripts that DeepSpeed copies beside the checkpoints at every one of them."""
        copy_scripts = ds_engine._copy_recovery_script
        ds_engine.checkpoint_engine = self
        ds_engine._copy_recovery_script = lambda path: self._attempt(lambda: copy_scripts(path), "recovery scripts")
        try:
            yield
        finally:
            ds_engine.checkpoint_engine = self._inner
            del ds_engine._copy_recovery_script

    def _attempt(self, action: Any, what: str) -> None:
        """Runs a part of the writing, and remembers its error. what: the file, for the error."""
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch.save turns some of the system's errors into RuntimeError
            self.errors.append(f"{what}: {first_line(error)}")

    def save(self, state_dict: Any, path: str) -> None:
        """Writes, flushes and hashes a file."""
        self._attempt(lambda: self._write(state_dict, Path(path)), path)

    def _write(self, state_dict: Any, path: Path) -> None:
        with path.open("wb") as file:
            hashed = _Hashed(file)
            torch.save(state_dict, cast(IO[bytes], hashed))  # it only writes
            file.flush()
            os.fsync(file.fileno())
        self.written[path.name] = hashed.facts

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder."""
        self._attempt(lambda: os.makedirs(path, exist_ok=exist_ok), path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def problem_of(path: Path, facts: dict[str, Any]) -> str | None:
    """Returns what is wrong with a file, against the size and sha256 that it should have; None when nothing is."""
    try:
        size = path.stat().st_size
        if size != facts["size"]:
            return f"{path.name} has {size} bytes instead of {facts['size']}"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if digest.hexdigest() == facts["sha256"] else f"{path.name} has changed (its sha256 is another)"


def problems_of(folder: Path, files: dict[str, dict[str, Any]], *, part: int = 0, parts: int = 1) -> list[str]:
    """Returns what is wrong with the `part`-th of `parts` shares of the files. files: facts by name."""
    names: Sequence[str] = sorted(files)[part::parts]
    return [problem for name in names if (problem := problem_of(folder / name, files[name])) is not None]


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, without a moment in which half of it looks complete."""
    with contextlib.suppress(OSError):
        (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_marker(marker: Path) -> dict[str, Any]:
    """Returns what a COMPLETE file says; nothing when it cannot be read."""
    try:
        contents = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def is_sound(marker: dict[str, Any]) -> bool:
    """Returns whether a marker is as it was written."""
    return marker.get("sha256") == seal(marker)


def seal(marker: dict[str, Any]) -> str:
    """Returns the hash of a marker, without the one that it holds."""
    rest = {key: value for key, value in marker.items() if key != "sha256"}
    return FileFacts.of(json.dumps(rest, sort_keys=True).encode()).sha256


def load_full_state(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """Returns the state of the whole module in fp32 on the CPU: consolidated from the ZeRO shards' master weights, or,
    for stage 0, the weights as the module had them (16-bit ones are widened)."""
    marker = json.loads((checkpoints / tag / COMPLETE).read_text(encoding="utf-8"))
    if marker["zero_stage"] == 0:
        # our own file, written by DeepSpeed as a pickle with optimizer objects: weights_only cannot read it
        saved = torch.load(checkpoints / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in saved["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
