"""Streaming readers of raw text: one paragraph at a time, whatever the size of the file or of the document."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from engine.config import SourceConfig
from engine.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SHOWN_BAD_LINES = 5
_BUFFER = 1 << 20


class Paragraph(NamedTuple):
    text: str
    """Stripped, never empty, no newline inside, encodable as UTF-8."""
    first: bool
    """Whether a new document starts here."""


def file_kind(path: Path) -> str | None:
    """text, json or parquet by the file's name; None for a name that no reader claims."""
    compressed = path.suffix in COMPRESSIONS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    kind = KINDS.get(suffix, "text" if compressed else None)
    return None if compressed and kind == "parquet" else kind


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
        self.saved_dataset = self._root.is_dir() and any(
            (self._root / name).is_file() for name in ("state.json", "dataset_dict.json")
        )
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
        for place, line in self._lines(path):
            text = self._decoded(place, line)
            if text is None:
                continue
            text = text.strip()
            if text:
                yield Paragraph(text, first)
            first = not text

    def _read_json(self, path: Path) -> Iterator[Paragraph]:
        for place, line in self._lines(path):
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
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._hash_file(path)
        number = 0
        try:
            # A buffered stream without pre-buffering reads page by page, not a whole column chunk.
            with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
                names = file.schema_arrow.names
                if self.source.field not in names:
                    raise UserError(
                        f"{path}: no column {self.source.field!r} (columns: {', '.join(names)}); set the "
                        "source's `field`"
                    )
                size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
                rows = max(1, min(1024, _BUFFER * max(1, file.metadata.num_rows) // max(1, size)))
                for batch in file.iter_batches(batch_size=rows, columns=[self.source.field], use_threads=False):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield from self._document(f"{path}:row {number}", value)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: not readable as Parquet after row {number} ({_first_line(error)}); replace the file"
            ) from error

    def _saved_dataset(self) -> Iterator[Paragraph]:
        from datasets import DatasetDict, load_from_disk

        try:
            data = load_from_disk(str(self._root))
        except Exception as error:  # datasets raises whatever its readers raise
            raise UserError(f"{self._root}: not a readable `datasets` folder ({_first_line(error)})") from error
        if isinstance(data, DatasetDict):
            if self.source.split not in data:
                raise UserError(f"{self._root}: no split {self.source.split!r} (splits: {', '.join(map(str, data))})")
            data = data[self.source.split]
        if self.source.field not in data.column_names:
            raise UserError(
                f"{self._root}: no column {self.source.field!r} (columns: {', '.join(data.column_names)}); set the "
                "source's `field`"
            )
        self._digest.update(data._fingerprint.encode())
        rows = data.select_columns([self.source.field])
        yield from self._rows(row[self.source.field] for row in rows)

    def _hub_dataset(self) -> Iterator[Paragraph]:
        from datasets import load_dataset

        name, field = self.source.path, self.source.field
        try:
            rows = iter(load_dataset(name, self.source.name, split=self.source.split, streaming=True))
        except Exception as error:  # network, hub, missing script or split: datasets has no common base class
            raise UserError(
                f"{name}: neither a local path nor a hub data set that can be reached ({_first_line(error)})"
            ) from error

        def values() -> Iterator[Any]:
            number = 0
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except Exception as error:
                    raise UserError(
                        f"{name}:row {number + 1}: the hub data set broke off ({_first_line(error)}); start the same "
                        "command again, finished shards are kept"
                    ) from error
                number += 1
                if field not in row:
                    raise UserError(
                        f"{name}: no column {field!r} (columns: {', '.join(row)}); set the source's `field`"
                    )
                if isinstance(row[field], str):
                    self._digest.update(row[field].encode("utf-8", "surrogatepass"))
                yield row[field]

        yield from self._rows(values())

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
            self._bad(place, f"document longer than a shard ({self._max} bytes)", "raise --shard_mb")
            return
        first = True
        for line in text.split("\n"):
            if line := line.strip():
                yield Paragraph(line, first)
                first = False

    def _decoded(self, place: str, line: bytes | None) -> str | None:
        if line is None:
            self._bad(place, f"line longer than a shard ({self._max} bytes)", "break it up or raise --shard_mb")
            return None
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self._bad(place, f"is not UTF-8 (byte {error.start + 1} of the line: {error.reason})", "convert the file")
            return None

    def _lines(self, path: Path) -> Iterator[tuple[str, bytes | None]]:
        """(file:line, bytes) of each line; None for one that is too long, of which nothing is kept."""
        number = 0
        try:
            with path.open("rb", buffering=0) as raw:
                counted = _Counted(raw, self._count)
                with _decompressed(counted, path.suffix) as stream:
                    while line := stream.readline(self._max + 2):
                        number += 1
                        if number == 1:
                            line = line.removeprefix(codecs.BOM_UTF8)
                        if len(line.rstrip(b"\r\n")) <= self._max:
                            yield f"{path}:{number}", line
                            continue
                        while line and not line.endswith(b"\n"):
                            line = stream.readline(_BUFFER)
                        yield f"{path}:{number}", None
                while counted.read(_BUFFER):  # bytes after the end of the compressed data belong to the hash
                    pass
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise UserError(
                f"{path}:{number + 1}: cannot be read from here on ({_first_line(error)}); replace the file"
            ) from error

    def _count(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self.raw_done += len(data)

    def _hash_file(self, path: Path) -> None:
        with path.open("rb") as raw:
            while block := raw.read(_BUFFER):
                self._count(block)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Counted(io.RawIOBase):
    """Passes a raw file's bytes on and shows each block to `seen`."""

    def __init__(self, raw: io.RawIOBase | BinaryIO, seen: Callable[[memoryview | bytes], None]) -> None:
        self._raw = cast(io.RawIOBase, raw)
        self._seen = seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._seen(memoryview(buffer)[:count])
        return count


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames. zstandard's own stream_reader takes a torn file for a complete one."""

    _CHUNK = 8192  # small: one block of 4 bytes may unpack to 128 KiB

    def __init__(self, raw: io.RawIOBase) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj
        self._raw = raw
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            packed = self._packed or self._raw.read(self._CHUNK) or b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the zstd data ends before its end marker")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._text = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def _decompressed(raw: io.RawIOBase, suffix: str) -> io.BufferedReader | gzip.GzipFile | lzma.LZMAFile:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, _BUFFER))
    if suffix == ".xz":
        return lzma.LZMAFile(io.BufferedReader(raw, _BUFFER))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _BUFFER)
    return io.BufferedReader(raw, _BUFFER)
