"""Rows of classification and regression tasks, read from .tsv, .csv and .jsonl files; errors name the file and line.

Tab-separated files are split at tabs and line ends and nothing else, as the GLUE files are meant: a quotation mark is
part of the text. Comma-separated files have quoting (RFC 4180). JSON lines hold one object each.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.tasks.rows import Rows
from engine.tasks.specs import Columns

KINDS = (".tsv", ".csv", ".jsonl")
_MISSING = object()
_UNLABELLED = frozenset({None, "", "-1", -1})
_Numbered = Iterator[tuple[int, list[Any]]]


def read_rows(
    path: Path, columns: Columns, *, labelled: bool, headerless: Sequence[str] = (), skip_short: bool = False
) -> Rows:
    """All rows of a file, in its order.

    `labelled`: the label column must be there; otherwise it may be absent, or say -1 or nothing in every row, which
    gives labels None. `headerless` names the columns of a file without a header line. `skip_short` leaves out, and
    counts, lines with too few columns. Empty lines do not count. Raises UserError.
    """
    header, records = _open(path, headerless)
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}: two columns are named {name!r}; rename one")
    label = columns.label if labelled or columns.label in header else None
    names = {"text": columns.first, "text_pair": columns.second, "label": label}
    where = {role: _find(path, header, name, columns, role) for role, name in names.items() if name is not None}
    ids_at = next((header.index(name) for name in columns.ids if name in header), None)
    lines: list[int] = []
    texts: dict[str, list[str]] = {role: [] for role in where if role != "label"}
    labels: list[Any] = []
    ids: list[str] = []
    skipped = 0
    for line, fields in records:
        if len(fields) != len(header):
            if skip_short and len(fields) < len(header):
                skipped += 1
                continue
            raise _wrong_width(path, line, len(fields), header)
        for role, column in texts.items():
            value = fields[where[role]]
            column.append(value if type(value) is str else _text(path, line, header[where[role]], value))
        if label is not None:
            labels.append(fields[where["label"]])
        ids.append(str(len(lines)) if ids_at is None else _id(path, line, header[ids_at], fields[ids_at]))
        lines.append(line)
    if not lines:
        wide = f" of {len(header)} columns" if skipped else ""
        raise UserError(f"{path}: has no rows{wide}; give a file with at least one")
    if label is not None:
        _check_labels_are_there(path, lines, label, labels)
    blank = label is None or (not labelled and _UNLABELLED.issuperset(labels))
    return Rows(
        source=str(path),
        lines=lines,
        first=texts["text"],
        second=texts.get("text_pair"),
        labels=None if blank else labels,
        ids=ids,
        skipped=skipped,
    )


def _open(path: Path, headerless: Sequence[str]) -> tuple[list[str], _Numbered]:
    """The names of the columns, and (line, values) of each row."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{path}: unknown kind of file; give {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    content = _read(path)
    if kind == ".jsonl":
        return _open_json(path, content)
    table = _split_tabs(content) if kind == ".tsv" else _split_commas(path, content)
    if headerless:
        return list(headerless), table
    _, header = next(table)  # _read has seen that there is one
    return header, table


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{beside(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = (
            error.object.count(b"\n", 0, error.start) + 1
        )  # the error's offsets do not count a BOM, its bytes neither
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file") from None
    if not content.strip():
        raise UserError(f"{path}: is empty; give a file with rows")
    return content


def beside(path: Path) -> str:
    """The end of a message about a path that is not there: what its folder holds instead, and the remedy."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent}); correct the path"
    there = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, there, n=1)
    remedy = f"; did you mean {near[0]!r}?" if near else "; correct the path, or add it"
    return f" ({path.parent} has: {', '.join(there[:12]) or 'nothing'}){remedy}"


def _split_tabs(content: str) -> _Numbered:
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines: U+2028 and the like are text
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _split_commas(path: Path, content: str) -> _Numbered:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
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


def _open_json(path: Path, content: str) -> tuple[list[str], _Numbered]:
    numbered = ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())
    objects = ((number, _json_object(path, number, line)) for number, line in numbered)
    first_number, first = next(objects)
    header = list(first)

    def rows() -> _Numbered:
        yield first_number, list(first.values())
        for number, row in objects:
            yield number, [row.get(name, _MISSING) for name in header]

    return header, rows()


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}:{number}: is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: is JSON but not an object; write one JSON object a line")
    if "\\u" in line:  # escapes can spell half a character, which no tokenizer takes
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number}: is not valid Unicode ({error.reason}); repair its \\u escapes") from None
    return row


def _find(path: Path, header: list[str], name: str, columns: Columns, role: str) -> int:
    if name in header:
        return header.index(name)
    near = difflib.get_close_matches(name, header, n=1)
    there = ", ".join(map(repr, header[:20])) or "none"
    if columns.setting is None:
        remedy = "give the file of the official download"
    else:
        remedy = f"set {columns.setting}.{role}" + (f" to {near[0]!r}" if near else " to one of them")
    raise UserError(f"{path}: no column {name!r} (its columns: {there}); {remedy}")


def _wrong_width(path: Path, line: int, found: int, header: list[str]) -> UserError:
    wanted = f"{len(header)} ({', '.join(header[:20])})"
    return UserError(f"{path}:{line}: has {found} column{'s' * (found != 1)}, not {wanted}; repair the line")


def _text(path: Path, line: int, name: str, value: Any) -> str:
    if value is _MISSING:
        raise UserError(f"{path}:{line}: has no {name!r}, which the first row has; add it")
    raise UserError(f"{path}:{line}: {name!r} is {json.dumps(value)[:40]}, not text; put it in quotes")


def _id(path: Path, line: int, name: str, value: Any) -> str:
    if value is _MISSING or value is None:
        raise UserError(f"{path}:{line}: has no {name!r}, which identifies the other rows; add it")
    text = str(value)
    if len(text.splitlines()) > 1 or "\t" in text:
        raise UserError(f"{path}:{line}: {name!r} is {text[:40]!r}; remove tabs and line breaks, it names a row")
    return text


def _check_labels_are_there(path: Path, lines: list[int], name: str, labels: list[Any]) -> None:
    for line, value in zip(lines, labels, strict=True):
        if value is _MISSING:
            raise UserError(f"{path}:{line}: has no {name!r}, which the first row has; add it")
        if isinstance(value, (list, dict)):
            raise UserError(f"{path}:{line}: {name!r} is {json.dumps(value)[:40]}, not one label; repair the line")
