"""Tables in files: tab- or comma-separated text, JSON lines, a JSON list, Parquet. What a file is, its content says; a
word is given where its name says something else.

Tab-separated text is split at tabs and line ends and nothing else, as the GLUE files are meant: a quotation mark is
part of the text. Quoting (RFC 4180) have files of other separators, those named .csv, and those whose header has it.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.prepare.compression import UNREADABLE, compression_of, decompressed, unreadable
from engine.data.prepare.contents import foreign, nested_rows
from engine.errors import UserError, first_line

MISSING = object()
"""The value of a JSON line that lacks a key which another line has."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
JSON_NAMES = frozenset({".jsonl", ".ndjson", ".json"})
PARQUET = b"PAR1"
WEB_PAGE = (b"<!doctype", b"<html")
Numbered = Iterator[tuple[int, list[Any]]]


@dataclass(frozen=True)
class Table:
    header: list[str]
    """Names of the columns."""
    rows: Numbered
    """(line, or number of the row in JSON lists and Parquet; values) of each row. A row may be too short or too long,
    a value of a JSON line MISSING."""
    kind: str
    """What it was read as, for people."""
    expected: bool
    """Whether the file's name says the same."""
    quoted: bool = True
    """False where quotation marks are part of the text."""
    separator: str | None = None
    """What stands between the columns of text."""


def open_table(path: Path, *, wanted: Sequence[str], headerless: Sequence[str] = ()) -> Table:
    """Opens the table in a file. `wanted`: columns by which the separator is told. `headerless`: names of the columns
    of a tab-separated file without a header line. Raises UserError for a file that holds no table."""
    data = _read(path)
    suffix = path.suffix.lower()
    if data.startswith(PARQUET):
        return _open_parquet(path, expected=suffix == ".parquet")
    content = _decoded(path, data)
    if headerless:
        return Table(list(headerless), _split_tabs(content), "separated by tabs", expected=True, quoted=False)
    if suffix in JSON_NAMES or re.match(r"\s*(\{|\[\s*\{)", content):
        return _open_json(path, content, wanted, expected=suffix in JSON_NAMES)
    return _open_separated(path, content, wanted)


def read_text(path: Path) -> str:
    """Reads a text file of UTF-8, without its byte order mark. Raises UserError for what is missing, empty or no such
    text."""
    return _decoded(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{beside(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file{beside(path / '?').partition(';')[0]}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    try:
        data = decompressed(io.BytesIO(data), compression_of(data)).read()
    except UNREADABLE as error:
        raise unreadable(str(path), error) from None
    if not data.startswith(PARQUET) and (what := foreign(data[:1000])):
        raise UserError(f"{path}: is {what}")
    if data[:100].lstrip().lower().startswith(WEB_PAGE):
        raise UserError(f"{path}: is a web page; download the file behind it")
    return data


def _decoded(path: Path, data: bytes) -> str:
    try:
        content = data.decode("utf-8-sig").replace("\n\ufeff", "\n")  # files that were put after one another
    except UnicodeDecodeError as error:
        # the error's offsets do not count a BOM, its bytes neither
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: is not UTF-8 ({error.reason}); convert it from its encoding, often: "
            "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from None
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise UserError(f"{path}:{line}: has a NUL character: not text, or UTF-16, or cut; give the file as UTF-8 text")
    _require_rows(path, content)
    return content


def _require_rows(path: Path, content: str) -> None:
    if not content.strip():
        raise UserError(f"{path}: is empty; give a file with rows")


def beside(path: Path) -> str:
    """Returns the end of a message about a path that is not there: what its folder holds instead, and the remedy."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent}); correct the path"
    there = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, there, n=1)
    remedy = f"; did you mean {near[0]!r}?" if near else "; correct the path, or add it"
    return f" ({path.parent} has: {', '.join(there[:12]) or 'nothing'}){remedy}"


def _open_separated(path: Path, content: str, wanted: Sequence[str]) -> Table:
    csv.field_size_limit(sys.maxsize)  # a cell may be as long as a document
    content = re.sub(r"^sep=.(?=[\r\n])", "", content)  # Excel's word on the separator
    _require_rows(path, content)
    first = re.split(r"[\r\n]", content.lstrip(), maxsplit=1)[0]
    named_csv = path.suffix.lower() == ".csv"
    usual = "," if named_csv else "\t"
    separator = next((one for one in (usual, *SEPARATORS) if set(wanted) <= set(_header(first, one))), usual)
    quoted = named_csv or separator != "\t" or first.startswith('"')
    spaced = f"{separator} " in first  # then a quoted cell begins behind the space
    rows = _split_quoted(path, content, separator, spaced=spaced) if quoted else _split_tabs(content)
    _, header = next(rows)  # there is one, since the content is not empty
    return Table(
        [name.strip() for name in header],
        rows,
        f"separated by {SEPARATORS[separator]}",
        expected=separator == usual,
        quoted=quoted,
        separator=separator,
    )


def _header(line: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=separator))]


def _split_tabs(content: str) -> Numbered:
    end = "\n" if "\n" in content else "\r"  # not splitlines: U+2028 and the like are text
    for number, line in enumerate(content.split(end), start=1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _split_quoted(path: Path, content: str, separator: str, *, spaced: bool) -> Numbered:
    lines = io.StringIO(content, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{number}: is not CSV ({error}); repair the quotes, or write .jsonl") from None
        if fields:
            yield number, fields


def _open_json(path: Path, content: str, wanted: Sequence[str], *, expected: bool) -> Table:
    found = _json_list(path, content) if content.lstrip().startswith("[") else _json_lines(path, content)
    objects = list(found)
    if why := nested_rows(objects[0][1], wanted[0]):
        raise UserError(f"{path}: {why}")
    header = list(dict.fromkeys(name for _, row in objects for name in row))
    rows = ((number, [row.get(name, MISSING) for name in header]) for number, row in objects)
    return Table(header, rows, "JSON", expected=expected)


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, _json_object(path, number, _json(path, number, line))


def _json_list(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _json(path, 1, content)
    if not rows:
        raise UserError(f"{path}: is an empty list; give a file with rows")
    for number, row in enumerate(rows, start=1):
        yield number, _json_object(path, number, row)


def _json(path: Path, number: int, text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _keys_once(path, number, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}:{number}: is not JSON ({error}); write one JSON object a line (jq -c . FILE > NEW), or one "
            "list of objects"
        ) from None
    except UserError:
        raise
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"{path}:{number}: cannot be read ({first_line(error)}); shorten the number") from None
    if "\\u" in text:  # escapes can spell half a character, which no tokenizer takes
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number}: is not valid Unicode ({error.reason}); repair its \\u escapes") from None
    return value


def _keys_once(path: Path, number: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}:{number}: {twice!r} occurs twice; rename one")
    return row


def _json_object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: is JSON but not an object; write one JSON object a line")
    return row


def _open_parquet(path: Path, *, expected: bool) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not readable as Parquet ({first_line(error)}); copy it again") from None
    classes = _class_names(table.schema.metadata or {})
    columns = [
        [_class_name(value, classes.get(name)) for value in column.to_pylist()]
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    rows = ((number, list(values)) for number, values in enumerate(zip(*columns, strict=True), start=1))
    return Table(table.column_names, rows, "Parquet", expected=expected)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Returns the names of the classes by column, which `datasets` writes beside their indices."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}  # a list is one of lists
    return {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def _class_name(value: Any, names: list[str] | None) -> Any:
    """Returns the name of a class; -1, which is no class, stays."""
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
