"""What a source can be stored as, each opened and streamed: lines of (compressed) files, and the text column of Parquet
files, of folders saved by `datasets` and of hub data sets. Memory is bounded by a line or a few rows."""

from __future__ import annotations

import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.data.prepare.compression import BUFFER, COMPRESSIONS, CountedFile, decompressed
from engine.errors import UserError

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def file_kind(path: Path) -> str | None:
    """text, json or parquet by the file's name; None for a name that no reader claims."""
    compressed = path.suffix in COMPRESSIONS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    kind = KINDS.get(suffix, "text" if compressed else None)
    return None if compressed and kind == "parquet" else kind


def read_lines(
    path: Path, *, max_bytes: int, seen: Callable[[memoryview | bytes], None]
) -> Iterator[tuple[str, bytes | None]]:
    """(file:line, bytes) of each line; None for one of more than `max_bytes`, of which nothing is kept.

    `seen` gets every byte of the file, as it lies on the disk.
    """
    number = 0
    try:
        with path.open("rb", buffering=0) as raw:
            counted = CountedFile(raw, seen)
            with decompressed(counted, path.suffix) as stream:
                while line := stream.readline(max_bytes + 2):
                    number += 1
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if len(line.rstrip(b"\r\n")) <= max_bytes:
                        yield f"{path}:{number}", line
                        continue
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(BUFFER)
                    yield f"{path}:{number}", None
            while counted.read(BUFFER):  # bytes after the end of the compressed data belong to the hash
                pass
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(
            f"{path}:{number + 1}: cannot be read from here on ({_first_line(error)}); replace the file"
        ) from error


def parquet_column(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # A buffered stream without pre-buffering reads page by page, not a whole column chunk.
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            _require_column(str(path), column, file.schema_arrow.names)
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            rows = max(1, min(1024, BUFFER * max(1, file.metadata.num_rows) // max(1, size)))
            for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield value
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not readable as Parquet after row {number} ({_first_line(error)}); replace the file"
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder (save_to_disk)."""
    return folder.is_dir() and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset_column(folder: Path, *, split: str, column: str) -> tuple[str, Iterator[Any]]:
    """The data set's fingerprint, and the values of one of its columns."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # datasets raises whatever its readers raise
        raise UserError(f"{folder}: not a readable `datasets` folder ({_first_line(error)})") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{folder}: no split {split!r} (splits: {', '.join(map(str, data))})")
        data = data[split]
    _require_column(str(folder), column, data.column_names)
    return data._fingerprint, (row[column] for row in data.select_columns([column]))


def hub_dataset_column(name: str, *, config_name: str | None, split: str, column: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        rows = iter(load_dataset(name, config_name, split=split, streaming=True))
    except Exception as error:  # network, hub, missing script or split: datasets has no common base class
        raise UserError(
            f"{name}: neither a local path nor a hub data set that can be reached ({_first_line(error)})"
        ) from error
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
        _require_column(name, column, list(row))
        yield row[column]


def _require_column(place: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(f"{place}: no column {column!r} (columns: {', '.join(columns)}); set the source's `field`")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
