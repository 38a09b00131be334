"""Streaming readers of raw text: one paragraph at a time, whatever the size of the file or of the document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.tools import SourceConfig
from engine.data.prepare.compression import BUFFER, COMPRESSIONS
from engine.data.prepare.formats import (
    KINDS,
    file_kind,
    hub_dataset_column,
    is_saved_dataset,
    parquet_column,
    read_lines,
    saved_dataset_column,
)
from engine.errors import UserError

_SHOWN_BAD_LINES = 5


class Paragraph(NamedTuple):
    text: str
    """Stripped, never empty, no newline inside, encodable as UTF-8."""
    first: bool
    """Whether a new document starts here."""


class SourceReader:
    """Iterates once over the paragraphs of one source.

    Memory: one line (at most `max_line_bytes`) plus fixed buffers. Bad input raises UserError naming file and line;
    with `skip_bad` bad lines and empty files are counted in `bad_lines` instead, and the first few kept in
    `bad_places`. A source without any text is an error in both cases.
    """

    def __init__(self, source: SourceConfig, *, max_line_bytes: int, skip_bad: bool = False) -> None:
        self.source = source
        self.documents = 0
        self.bad_lines = 0
        self.bad_places: list[str] = []
        self.raw_done = 0
        """Bytes of the files read so far (compressed bytes, for compressed files)."""
        self._max = max_line_bytes
        self._skip = skip_bad
        self._digest = hashlib.sha256()
        self._root = Path(source.path).expanduser()
        self.saved_dataset = is_saved_dataset(self._root)
        self.files = self._find_files()
        self.ignored = 0 if self.saved_dataset or not self._root.is_dir() else self._count_ignored()
        self._stats = [(path, path.stat()) for path in self.files]
        self.raw_total = sum(stat.st_size for _, stat in self._stats) or None
        """Bytes of all files; None when unknown (a hub data set)."""

    def stamp(self) -> str:
        """Changes when the source's options, or the name, size or time of one of its files, change."""
        options = {k: v for k, v in asdict(self.source).items() if k != "weight"}
        files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in self._stats]
        return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()

    def digest(self) -> str:
        """Hash of what was read, valid after the iteration: of the files' bytes (one after another); of the
        fingerprint of a data set on disk; of the texts of a hub data set."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Paragraph]:
        count = 0
        for paragraph in self._paragraphs():
            count += 1
            self.documents += paragraph.first
            yield paragraph
        if count == 0:
            raise UserError(f"{self.source.path}: no text in it; remove it from sources, or give the right file")

    def _find_files(self) -> list[Path]:
        if self.saved_dataset:
            return sorted(path for path in self._root.rglob("*") if path.is_file())
        if self._root.is_file():
            if self._root.suffix in COMPRESSIONS and Path(self._root.stem).suffix == ".parquet":
                raise UserError(f"{self._root}: unpack it first; Parquet files hold their own compression")
            return [self._root]
        if self._root.is_dir():
            found = [path for path in self._visible_files() if file_kind(path)]
            if not found:
                names = ", ".join([*KINDS, *COMPRESSIONS])
                raise UserError(f"{self._root}: no file in this folder has a known ending ({names})")
            return found
        name = self.source.path
        if name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix in (*KINDS, *COMPRESSIONS):
            raise UserError(f"{name}: no such file or folder")
        return []

    def _visible_files(self) -> list[Path]:
        relative = (path.relative_to(self._root) for path in self._root.rglob("*") if path.is_file())
        shown = (path for path in relative if not any(part.startswith(".") for part in path.parts))
        return [self._root / path for path in sorted(shown, key=lambda path: path.as_posix())]

    def _count_ignored(self) -> int:
        return len(self._visible_files()) - len(self.files)

    def _paragraphs(self) -> Iterator[Paragraph]:
        if self.saved_dataset:
            yield from self._saved_dataset()
        elif not self.files:
            yield from self._hub_dataset()
        for path in [] if self.saved_dataset else self.files:
            kind = file_kind(path) or "text"  # a file that was named is read as text, whatever its ending
            found = False
            for paragraph in getattr(self, f"_read_{kind}")(path):
                found = True
                yield paragraph
            if not found:
                self._bad(str(path), "is empty (no text in it)", "remove it")

    def _bad(self, place: str, what: str, remedy: str) -> None:
        if not self._skip:
            raise UserError(f"{place}: {what}; {remedy}, or skip and count such lines with --on_bad_line skip")
        self.bad_lines += 1
        if len(self.bad_places) < _SHOWN_BAD_LINES:
            self.bad_places.append(f"{place}: {what}")

    def _read_text(self, path: Path) -> Iterator[Paragraph]:
        first = True
        for place, line in read_lines(path, max_bytes=self._max, seen=self._count):
            text = self._decoded(place, line)
            if text is None:
                continue
            text = text.strip()
            if text:
                yield Paragraph(text, first)
            first = not text

    def _read_json(self, path: Path) -> Iterator[Paragraph]:
        for place, line in read_lines(path, max_bytes=self._max, seen=self._count):
            text = self._decoded(place, line)
            if text is None or not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                self._bad(place, f"is not JSON ({error})", "write one JSON object a line")
                continue
            if not isinstance(row, dict):
                self._bad(place, f"is JSON but not an object (a {type(row).__name__})", "write one JSON object a line")
            elif self.source.field not in row:
                keys = ", ".join(map(repr, list(row)[:8])) or "none"
                self._bad(place, f"has no field {self.source.field!r} (its fields: {keys})", "set the source's `field`")
            else:
                yield from self._document(place, row[self.source.field])

    def _read_parquet(self, path: Path) -> Iterator[Paragraph]:
        self._hash_file(path)
        for number, value in enumerate(parquet_column(path, self.source.field), start=1):
            yield from self._document(f"{path}:row {number}", value)

    def _saved_dataset(self) -> Iterator[Paragraph]:
        fingerprint, values = saved_dataset_column(self._root, split=self.source.split, column=self.source.field)
        self._digest.update(fingerprint.encode())
        yield from self._rows(values)

    def _hub_dataset(self) -> Iterator[Paragraph]:
        values = hub_dataset_column(
            self.source.path, config_name=self.source.name, split=self.source.split, column=self.source.field
        )
        yield from self._rows(self._hashed(values))

    def _hashed(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            if isinstance(value, str):
                self._digest.update(value.encode("utf-8", "surrogatepass"))
            yield value

    def _rows(self, values: Iterable[Any]) -> Iterator[Paragraph]:
        for number, value in enumerate(values, start=1):
            yield from self._document(f"{self.source.path}:row {number}", value)

    def _document(self, place: str, text: Any) -> Iterator[Paragraph]:
        """One document held in one string: each of its lines is a paragraph."""
        if not isinstance(text, str):
            self._bad(place, f"field {self.source.field!r} is {type(text).__name__}, not text", "repair it")
            return
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
            self._bad(place, f"field {self.source.field!r} is not valid Unicode ({error.reason})", "repair it")
            return
        if size > self._max:
            self._bad(place, f"document longer than a shard ({self._max:,} bytes)", "raise --shard_mb")
            return
        first = True
        for line in text.split("\n"):
            if line := line.strip():
                yield Paragraph(line, first)
                first = False

    def _decoded(self, place: str, line: bytes | None) -> str | None:
        if line is None:
            self._bad(place, f"line longer than a shard ({self._max:,} bytes)", "break it up or raise --shard_mb")
            return None
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self._bad(place, f"is not UTF-8 (byte {error.start + 1} of the line: {error.reason})", "convert the file")
            return None

    def _count(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self.raw_done += len(data)

    def _hash_file(self, path: Path) -> None:
        with path.open("rb") as raw:
            while block := raw.read(BUFFER):
                self._count(block)
