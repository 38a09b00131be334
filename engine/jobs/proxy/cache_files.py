"""The files of a teacher's cache: parts that one process each appends to.

`part-0.bin` holds tensors one after the other, `part-0.jsonl` what lies where. An entry is written after its tensors;
what a killed process left behind its last entry is overwritten.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from engine.records.files import AppendFile
from engine.records.flock import Flock, try_flock

ALIGNED = 64
"""Bytes that the beginning of each tensor is a multiple of."""


@dataclass(frozen=True)
class Piece:
    """One captured tensor of every entry."""

    kind: str
    layer: int
    heads: int
    """Number of heads; 0: a hidden state."""
    width: int
    """Width of the hidden state, or of a head."""

    @property
    def per_token(self) -> int:
        """Numbers for a token"""
        return self.width * max(1, self.heads)


@dataclass(frozen=True)
class Entry:
    """The teacher's pass over one batch, and its place in the files."""

    data: Path
    at: int
    """Offset of its first tensor, in bytes."""
    rows: tuple[int, int]
    """Number of sequences and their length; (1, T) without pads, T as in Features."""
    lengths: tuple[int, ...] | None
    """Lengths of the sequences where they lie without pads, in tokens; None with pads."""
    pieces: tuple[Piece, ...]
    scaling: dict[int, float]


class PartWriter:
    """A part that no other process appends to."""

    def __init__(self, folder: Path) -> None:
        """Takes over a part of a process that is gone, or begins one. Raises OSError."""
        for number in itertools.count():
            self._data_path, self._index_path = folder / f"part-{number}.bin", folder / f"part-{number}.jsonl"
            is_new = not self._index_path.exists()
            try:
                index = self._index_path.open("x+" if is_new else "a+", encoding="utf-8")
            except FileExistsError:  # made by another process meanwhile
                continue
            lock = try_flock(index)
            if lock is Flock.HELD or (lock is Flock.MISSING and not is_new):  # another process's, or it could be
                index.close()
                continue
            self._index: IO[str] = index
            break
        _, whole, end = read_index(self._index_path)
        self._index.truncate(whole)  # a torn line
        # unbuffered: what a full disk has refused must not come up again when they are closed
        self._lines, self._data = AppendFile(self._index_path), AppendFile(self._data_path)
        os.truncate(self._data_path, end)
        self._end = end

    def append(
        self,
        key: str,
        tensors: list[torch.Tensor],
        rows: tuple[int, ...],
        lengths: tuple[int, ...] | None,
        pieces: tuple[Piece, ...],
        scaling: dict[int, float],
    ) -> Entry:
        """Writes an entry, whose tensors lie on the CPU. Raises OSError, and it is then not there."""
        at = self._end
        for tensor in tensors:
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            self._data.append(memoryview(raw))  # type: ignore[arg-type]
            self._data.append(bytes(-len(raw) % ALIGNED))
            self._end += len(raw) + -len(raw) % ALIGNED
        line = {
            "batch": key,
            "at": at,
            "end": self._end,
            "rows": rows,
            "lengths": lengths,
            "pieces": [[p.kind, p.layer, p.heads, p.width] for p in pieces],
            "scaling": scaling,
        }
        self._lines.append(f"{json.dumps(line)}\n".encode())
        return Entry(self._data_path, at, (rows[0], rows[1]), lengths, pieces, dict(scaling))

    def close(self) -> None:
        """Lets another process have the part."""
        self._data.close()
        self._lines.close()
        self._index.close()


def read_index(path: Path, start: int = 0) -> tuple[dict[str, Entry], int, int]:
    """Returns the entries by batch from byte `start` on, and the lengths in bytes of the index up to its last whole
    line and of the data that it speaks of."""
    entries: dict[str, Entry] = {}
    whole, end = start, 0
    data = path.with_suffix(".bin")
    data_size = data.stat().st_size if data.exists() else 0
    for line in path.read_bytes()[start:].splitlines(keepends=True):
        try:
            fields: dict[str, Any] = json.loads(line)
            entry = Entry(
                data,
                fields["at"],
                (fields["rows"][0], fields["rows"][1]),
                None if fields["lengths"] is None else tuple(fields["lengths"]),
                tuple(Piece(*piece) for piece in fields["pieces"]),
                {int(layer): factor for layer, factor in fields["scaling"].items()},
            )
        except (ValueError, KeyError, TypeError):
            break
        if fields["end"] > data_size or not line.endswith(b"\n"):
            break
        entries[fields["batch"]] = entry
        whole, end = whole + len(line), fields["end"]
    return entries, whole, end
