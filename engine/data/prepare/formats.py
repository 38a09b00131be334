"""What a source can be stored as, each opened and streamed: lines and tables of (compressed) files, and the text column
of Parquet files, of folders saved by `datasets` and of hub data sets. Memory is bounded by a line or a few rows."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.data.prepare.compression import BUFFER, UNREADABLE, CountedFile, decompressed, unreadable
from engine.data.prepare.contents import Contents, table_rows
from engine.errors import UserError, first_line

_MARK = codecs.BOM_UTF8.decode("latin-1")


def read_lines(
    path: Path, contents: Contents, *, max_bytes: int, seen: Callable[[memoryview | bytes], None]
) -> Iterator[tuple[str, bytes | None]]:
    """Yields (file:line, bytes) of each line; None for one of more than `max_bytes`, of which nothing is kept.

    `seen` gets every byte of the file, as it lies on the disk.
    """
    number = 0
    try:
        with _opened(path, contents, seen, newline=contents.newline) as stream:
            while line := stream.readline(max_bytes + 2):
                number += 1
                if len(line.rstrip("\r\n")) <= max_bytes:
                    yield f"{path}:{number}", line.encode("latin-1")
                    continue
                while line and not line.endswith("\n"):
                    line = stream.readline(BUFFER)
                yield f"{path}:{number}", None
    except UNREADABLE as error:
        raise unreadable(f"{path}:{number + 1}", error) from error


def read_table(
    path: Path, contents: Contents, column: str, *, max_bytes: int, seen: Callable[[memoryview | bytes], None]
) -> Iterator[tuple[str, bytes | str]]:
    """Yields (file:line, cell of `column`) of each row of a CSV or TSV file; in place of the cell a str says what is
    wrong with the row. A cell of more than `max_bytes` is wrong."""
    place = str(path)
    before = csv.field_size_limit(max_bytes)
    try:
        with _opened(path, contents, seen, newline="") as stream:
            rows = table_rows((line.removeprefix(_MARK) for line in stream), contents.delimiter)
            written = next(row for row in rows if row and not row[0].startswith("sep="))
            header = [name.strip(" ") for name in written]
            at = header.index(column.encode().decode("latin-1"))
            while True:
                begin = rows.line_num + 1
                place = f"{path}:{begin}"
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    to = f" to line {rows.line_num:,}" if rows.line_num > begin else ""
                    yield place, f"is not a valid table row{to} ({error})"
                    continue
                if row == written:
                    yield place, "repeats the header"
                elif len(row) not in (0, len(header)):
                    yield place, f"has {len(row)} columns, not {len(header)} as the header"
                elif row:
                    yield place, row[at].encode("latin-1")
    except UNREADABLE as error:
        raise unreadable(place, error) from error
    finally:
        csv.field_size_limit(before)


@contextlib.contextmanager
def _opened(
    path: Path, contents: Contents, seen: Callable[[memoryview | bytes], None], *, newline: str | None
) -> Iterator[io.TextIOWrapper]:
    """Opens a file, unpacked, with a character for each byte (Latin-1): what is not UTF-8 is told line by line."""
    with path.open("rb", buffering=0) as raw:
        counted = CountedFile(raw, seen)
        stream = io.TextIOWrapper(decompressed(counted, contents.compression), "latin-1", newline=newline)
        yield stream
        while counted.read(BUFFER):  # bytes after the end of the compressed data belong to the hash
            pass


def parquet_column(path: Path, column: str) -> Iterator[Any]:
    """Yields the values of a column."""
    with _opened_parquet(path, column) as file:
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        rows = max(1, min(1024, BUFFER * max(1, file.metadata.num_rows) // max(1, size)))
        for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


def parquet_rows(path: Path, column: str) -> int:
    """Returns the number of rows. Raises UserError for a file whose end is torn, or that lacks the column."""
    with _opened_parquet(path, column) as file:
        return int(file.metadata.num_rows)


@contextlib.contextmanager
def _opened_parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffered stream without pre-buffering reads page by page, not a whole column chunk.
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            _require_column(str(path), column, file.schema_arrow.names)
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as Parquet ({first_line(error)}); replace the file") from error


def is_saved_dataset(folder: Path) -> bool:
    """Tells whether `datasets` wrote this folder (save_to_disk)."""
    return os.path.isdir(folder) and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset_column(folder: Path, *, split: str | None, column: str) -> tuple[str, Iterator[Any]]:
    """Returns the data set's fingerprint, and the values of one of its columns. split: None for train, or for the only
    one."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # datasets raises whatever its readers raise
        raise UserError(f"{folder}: not a readable `datasets` folder ({first_line(error)})") from error
    if isinstance(data, DatasetDict):
        wanted = "train" if split is None else split
        if wanted not in data:
            raise UserError(f"{folder}: no split {wanted!r} (splits: {', '.join(map(str, data))})")
        data = data[wanted]
    elif split not in (None, str(data.split)):
        raise UserError(f"sources.split={split!r}: has no effect on {folder}, which holds one data set; remove it")
    _require_column(str(folder), column, data.column_names)
    return data._fingerprint, (row[column] for row in data.select_columns([column]))


def hub_dataset_column(name: str, *, config_name: str | None, split: str, column: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        with offline_if_unreachable() as reachable:
            rows = iter(load_dataset(name, config_name, split=split, streaming=True))
    except Exception as error:  # network, hub, missing script or split: datasets has no common base class
        of_hub = not reachable and isinstance(error, OSError)  # ConnectionError, or a FileNotFoundError in its cache
        reason = "the hub cannot be reached from here" if of_hub else first_line(error)
        raise UserError(
            f"{name}: neither a local path nor an available hub data set ({reason}); correct the path or the name"
        ) from error
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(
                f"{name}:row {number + 1}: the hub data set broke off ({first_line(error)}); start the same "
                "command again, finished shards are kept"
            ) from error
        number += 1
        _require_column(name, column, list(row))
        yield row[column]


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Sends `datasets` to its cache at once, where it would get there after all its retries. Gives whether the hub can
    be reached."""
    from datasets import config

    from engine.hub.files import hub_is_reachable

    before, reachable = config.HF_HUB_OFFLINE, hub_is_reachable()
    config.HF_HUB_OFFLINE = before or not reachable
    try:
        yield reachable
    finally:
        config.HF_HUB_OFFLINE = before


def _require_column(place: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(
            f"{place}: no column {column!r} (columns: {', '.join(map(repr, columns))}); set the source's `field`"
        )
    if columns.count(column) > 1:
        raise UserError(f"{place}: has two columns {column!r}: rename one")
