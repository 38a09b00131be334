"""Streaming readers of raw text: one paragraph at a time, whatever the size of the file or of the document."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.tools import SourceConfig
from engine.data.prepare.compression import BUFFER, COMPRESSIONS
from engine.data.prepare.contents import KINDS, Contents
from engine.data.prepare.formats import (
    hub_dataset_column,
    is_saved_dataset,
    parquet_column,
    read_lines,
    read_table,
    saved_dataset_column,
)
from engine.data.prepare.selection import Selection, select_file, select_folder
from engine.errors import UserError

_MARK = "\ufeff"  # byte order mark
_BETWEEN = re.compile(f"{_MARK}|<\\|endoftext\\|>")  # stands between documents: of joined files, of GPT's corpora
_SHOWN_BAD_LINES = 5
_SHOWN_CHARACTERS = 80


class Paragraph(NamedTuple):
    text: str
    """Stripped, never empty, no line end inside, encodable as UTF-8."""
    first: bool
    """Whether a new document starts here."""


class SourceReader:
    """An iterator over the paragraphs of one source, to be used once.

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
        self._root = Path(source.path)
        self.saved_dataset = is_saved_dataset(self._root)
        self.selection = self._select()
        self._stats = [(path, path.stat()) for path in self._stored()]
        self.raw_total = sum(stat.st_size for _, stat in self._stats) or None
        """Bytes of all files; None when unknown (a hub data set)."""
        self._stream = self._counted()

    def stamp(self) -> str:
        """Returns a hash of the source's options, and of the names, sizes and times of its files."""
        options = {k: v for k, v in asdict(self.source).items() if k != "weight"}
        files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in self._stats]
        return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()

    def digest(self) -> str:
        """Returns a hash of what was read, valid after the iteration: of the files' bytes (one after another), the
        fingerprint of a data set on disk, or the texts of a hub data set."""
        return self._digest.hexdigest()

    def beginning(self) -> str:
        """Returns the first characters that will be trained on, lines apart. Call it before the iteration, which then
        gives the same text again."""
        taken: list[Paragraph] = []
        while sum(len(paragraph.text) for paragraph in taken) < _SHOWN_CHARACTERS:
            if (paragraph := next(self._stream, None)) is None:
                break
            taken.append(paragraph)
        self._stream = itertools.chain(taken, self._stream)
        return "\n".join(paragraph.text for paragraph in taken)[:_SHOWN_CHARACTERS]

    def __iter__(self) -> Iterator[Paragraph]:
        return self._stream

    def _counted(self) -> Iterator[Paragraph]:
        count = 0
        for paragraph in self._paragraphs():
            count += 1
            self.documents += paragraph.first
            yield paragraph
        if count == 0:
            skipped = f", but bad lines, the first {self.bad_places[0]}" if self.bad_places else ""
            raise UserError(
                f"{self.source.path}: no text in it{skipped}; remove it from sources, or give the right file"
            )

    def _select(self) -> Selection:
        if self.saved_dataset:
            self.source.refuse_unused(f"{self._root}, which `datasets` saved", "name")
        elif os.path.isfile(self._root):
            return select_file(self._root, self.source)
        elif os.path.isdir(self._root):
            return select_folder(self._root, self.source)
        else:
            self._require_hub_name()
        return Selection()

    def _require_hub_name(self) -> None:
        name = self.source.path
        if os.path.exists(self._root):
            raise UserError(f"{name}: neither a file nor a folder (a pipe or a device?); write its text to a file")
        if "://" in name:
            raise UserError(f"{name}: a URL; download it and name the file (a data set of the hub: OWNER/NAME)")
        if set(name) & set("*?["):
            raise UserError(f"{name}: patterns are not read; name the folder, or each file as a source of its own")
        ending = Path(name).suffix.lower()
        path_like = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
        if path_like or ending in (*KINDS, *COMPRESSIONS):
            raise UserError(f"{name}: no such file or folder; correct the path")

    def _stored(self) -> Iterable[Path]:
        if self.saved_dataset:
            return sorted(path for path in self._root.rglob("*") if path.is_file())
        return self.selection.files

    def _paragraphs(self) -> Iterator[Paragraph]:
        if self.saved_dataset:
            yield from self._saved_dataset()
        elif not self.selection.files:
            yield from self._hub_dataset()
        for path, contents in self.selection.files.items():
            found = False
            for paragraph in getattr(self, f"_read_{contents.kind}")(path, contents):
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

    def _read_text(self, path: Path, contents: Contents) -> Iterator[Paragraph]:
        first = True
        for _, line in self._lines(path, contents):
            for text in _split(line) or [""]:
                if text:
                    yield Paragraph(text, first)
                first = not text

    def _read_extracted(self, path: Path, contents: Contents) -> Iterator[Paragraph]:
        first = True
        for _, line in self._lines(path, contents):
            line = line.lstrip(_MARK)
            if line.startswith("<doc "):
                first = True
            elif line.strip() != "</doc>":
                for text in filter(None, _split(html.unescape(line))):
                    yield Paragraph(text, first)
                    first = False

    def _read_json(self, path: Path, contents: Contents) -> Iterator[Paragraph]:
        column = self.source.column
        for place, line in self._lines(path, contents):
            text = line.lstrip(_MARK)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
                self._bad(place, f"is not JSON ({error})", "write one JSON object a line (jq -c . FILE > NEW)")
                continue
            if not isinstance(row, dict):
                remedy = "write one JSON object a line"
                if isinstance(row, str):
                    remedy += f" (jq -c '{{{json.dumps(column)}: .}}' FILE > NEW)"
                self._bad(place, f"is JSON but not an object (a {type(row).__name__})", remedy)
            elif column not in row:
                keys = ", ".join(map(repr, list(row)[:8])) or "none"
                self._bad(place, f"has no field {column!r} (its fields: {keys})", "set the source's `field`")
            else:
                yield from self._document(place, row[column])

    def _read_table(self, path: Path, contents: Contents) -> Iterator[Paragraph]:
        for place, cell in read_table(path, contents, self.source.column, max_bytes=self._max, seen=self._count):
            if isinstance(cell, str):
                self._bad(place, cell, "repair it (its quotes?), or raise --shard_mb")
            elif (text := self._decoded(place, cell)) is not None:
                yield from self._document(place, text)

    def _read_parquet(self, path: Path, contents: Contents) -> Iterator[Paragraph]:
        self._hash_file(path)
        for number, value in enumerate(parquet_column(path, self.source.column), start=1):
            yield from self._document(f"{path}:row {number}", value)

    def _saved_dataset(self) -> Iterator[Paragraph]:
        fingerprint, values = saved_dataset_column(self._root, split=self.source.split, column=self.source.column)
        self._digest.update(fingerprint.encode())
        yield from self._rows(values)

    def _hub_dataset(self) -> Iterator[Paragraph]:
        values = hub_dataset_column(
            self.source.path, config_name=self.source.name, split=self.source.wanted_split, column=self.source.column
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
        """Yields the paragraphs of a document that is one string: each of its lines."""
        column = self.source.column
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            self._bad(place, f"field {column!r} is {kind}, not text", "repair it")
            return
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
            self._bad(place, f"field {column!r} is not valid Unicode ({error.reason})", "repair it")
            return
        if size > self._max:
            self._bad(place, f"document longer than a shard ({self._max:,} bytes)", "raise --shard_mb")
            return
        if "\0" in text:
            self._bad(place, f"field {column!r} holds NUL characters, which no text has", "repair it")
            return
        first = True
        for line in filter(None, _split(text)):
            yield Paragraph(line, first)
            first = False

    def _lines(self, path: Path, contents: Contents) -> Iterator[tuple[str, str]]:
        """Yields (file:line, text) of the good lines."""
        for place, line in read_lines(path, contents, max_bytes=self._max, seen=self._count):
            if line is None:
                by_hand = "write one JSON object a line" if contents.kind == "json" else "fold -s -w 10000 FILE > NEW"
                self._bad(place, f"line longer than a shard ({self._max:,} bytes)", f"{by_hand}, or raise --shard_mb")
            elif (text := self._decoded(place, line)) is not None:
                yield place, text

    def _decoded(self, place: str, line: bytes) -> str | None:
        if b"\0" in line:
            self._bad(
                place, "holds NUL bytes, like a file that was being written when the machine crashed", "repair it"
            )
            return None
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 (byte {error.start + 1} of the line: {error.reason})"
            self._bad(place, what, "convert the file (iconv -f ITS-ENCODING -t UTF-8 FILE > NEW)")
            return None

    def _count(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self.raw_done += len(data)

    def _hash_file(self, path: Path) -> None:
        with path.open("rb") as raw:
            while block := raw.read(BUFFER):
                self._count(block)


def _split(text: str) -> list[str]:
    """Returns the paragraphs of a line or document: they end at every line end that Unicode knows. Empty ones divide
    documents; so do a byte order mark, with which another file begins that was appended, and <|endoftext|>."""
    return [line.strip() for line in _BETWEEN.sub("\n\n", text.strip()).splitlines()]
