"""Rows of classification and regression tasks from files: which columns hold what. Errors name the file and line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.tasks.rows import Rows
from engine.tasks.specs import Columns
from engine.tasks.tables import MISSING, Table, open_table


def read_rows(
    path: Path, columns: Columns, *, labelled: bool, headerless: Sequence[str] = (), skip_short: bool = False
) -> Rows:
    """Reads all rows of a file, in its order.

    `labelled`: the label column must be there; otherwise it is not read, and labels are None. `headerless` names the
    columns of a file without a header line. `skip_short` leaves out, and counts, lines with too few columns. Empty
    lines do not count. Raises UserError.
    """
    roles = {"text": columns.first, "text_pair": columns.second, "label": columns.label if labelled else None}
    names = {role: name for role, name in roles.items() if name is not None}
    table = open_table(path, wanted=list(names.values()), headerless=headerless)
    header = table.header
    at = {role: _column_index(path, table, name, columns, role) for role, name in names.items()}
    ids = (one for name in columns.ids for one in header if one.casefold() == name)  # Id, ID
    ids_at = next((_column_index(path, table, name, columns, "id") for name in ids), None)
    again = [name.casefold() for name in header]
    lines: list[int] = []
    values: dict[str, list[Any]] = {role: [] for role in at}
    row_ids: list[str] = []
    skipped = 0
    for line, fields in table.rows:
        if len(fields) != len(header):
            if skip_short and len(fields) < len(header):
                skipped += 1
                continue
            raise _wrong_width(path, line, len(fields), header)
        if _shown(fields[at["text"]]) == again[at["text"]] and [*map(_shown, fields)] == again:
            raise UserError(f"{path}:{line}: is the header line again, as in files joined together; remove it")
        for role, column in values.items():
            value = fields[at[role]]
            if type(value) is not str:
                value = _checked_value(path, line, header[at[role]], value, is_label=role == "label")
            column.append(value)
        row_ids.append(str(len(lines)) if ids_at is None else _id(path, line, header[ids_at], fields[ids_at]))
        lines.append(line)
    if not lines:
        wide = f" of {len(header)} columns" if skipped else ""
        raise UserError(f"{path}: has no rows{wide}; give a file with at least one")
    return Rows(
        source=str(path),
        lines=lines,
        first=values["text"],
        second=values.get("text_pair"),
        labels=values.get("label"),
        ids=row_ids,
        notes=_notes(path, table, columns, values, skipped, swallowed=_swallowed(table, lines, values, at)),
    )


def _shown(value: Any) -> str:
    return str(value).strip().casefold()


def _swallowed(table: Table, lines: list[int], values: dict[str, list[Any]], at: dict[str, int]) -> list[int]:
    """Returns where texts begin that hold a line with as many columns as the table and one of its labels: quotation
    marks that do not pair make one cell of several rows."""
    labels = {_shown(label) for label in values.get("label", ())} if table.separator else set()
    found = []
    for role in ("text", "text_pair"):
        for line, cell in zip(lines, values.get(role, ()), strict=False):
            rows = (part.split(table.separator) for part in cell.split("\n")[:-1]) if "\n" in cell else ()
            if any(len(row) == len(table.header) and _shown(row[at["label"]]) in labels for row in rows):
                found.append(line)
    return found


def _notes(
    path: Path, table: Table, columns: Columns, values: dict[str, list[Any]], skipped: int, *, swallowed: list[int]
) -> tuple[str, ...]:
    notes = []
    if swallowed:
        notes.append(
            f"{path}:{swallowed[0]}: a text holds whole rows of the file, as when quotation marks do not pair "
            f"({len(swallowed):,} such texts); repair the quotes"
        )
    endings = (("1$", "2"), ("a$", "b"), ("A$", "B"), ("$", "2"))
    partners = {re.sub(end, other, columns.first) for end, other in endings} - {columns.first}
    partner = sorted(partners & set(table.header))
    if columns.setting is not None and columns.second is None and partner:
        notes.append(f"{path}: column {partner[0]!r} is not read; for pairs of texts set {columns.setting}.text_pair")
    if not table.expected:
        notes.append(f"{path}: is read as {table.kind}, although its name does not say so")
    if skipped:
        notes.append(f"{path}: lines with too few columns, left out as the official reader does: {skipped}")
    if columns.setting is not None and not table.quoted:  # official files are full of quotation marks
        cells = [cell for name in ("text", "text_pair") for cell in values.get(name, ())]
        quoted = sum(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
        if quoted:
            notes.append(
                f'{path}: {quoted:,} texts stand between "quotation marks", which are part of a text in tab-separated '
                "files; where they are the quotes of CSV, name the file .csv"
            )
    return tuple(notes)


def _column_index(path: Path, table: Table, name: str, columns: Columns, role: str) -> int:
    header = table.header
    if header.count(name) > 1:
        raise UserError(f"{path}: two columns are named {name!r}; rename one")
    if name in header:
        return header.index(name)
    used = {columns.first, columns.second, columns.label}
    near = difflib.get_close_matches(name, [column for column in header if column not in used], n=1)
    shown = ", ".join(repr(column[:40]) for column in header[:20]) or "none"
    if columns.setting is None:
        remedy = "give the file of the official download"
    elif near:
        remedy = f"set {columns.setting}.{role} to {near[0]!r}"
    elif table.separator is None or columns.first in header:
        remedy = f"set {columns.setting}.{role} to one of them, or give a file that has it"
    else:
        remedy = f"set {columns.setting}.{role} to one of them, or add a header line if the file has none"
    raise UserError(f"{path}: no column {name!r} (its columns: {shown}); {remedy}")


def _wrong_width(path: Path, line: int, found: int, header: list[str]) -> UserError:
    wanted = f"{len(header)} ({', '.join(header[:20])})"
    return UserError(f"{path}:{line}: has {found} column{'s' * (found != 1)}, not {wanted}; repair the line")


def _checked_value(path: Path, line: int, name: str, value: Any, *, is_label: bool) -> Any:
    """Returns what is no text as it counts: labels may be numbers, truth values, null and missing; a text may be null,
    which is an empty one."""
    if is_label and (value is None or value is MISSING or isinstance(value, (bool, int, float))):
        return None if value is MISSING else value
    if value is MISSING:
        raise UserError(f"{path}:{line}: has no {name!r}, which other rows have; add it")
    if value is None:
        return ""
    shown = json.dumps(value, default=str)[:40]
    if is_label:
        wanted = "one label; repair the line"
    elif isinstance(value, (list, dict)):
        wanted = "text; write one object a row (pandas: to_json(FILE, orient='records', lines=True))"
    else:
        wanted = "text; write the text between quotation marks"
    raise UserError(f"{path}:{line}: {name!r} is {shown}, not {wanted}")


def _id(path: Path, line: int, name: str, value: Any) -> str:
    if value is MISSING or value is None:
        raise UserError(f"{path}:{line}: has no {name!r}, which identifies the other rows; add it")
    text = str(value)
    if len(text.splitlines()) > 1 or "\t" in text:
        raise UserError(f"{path}:{line}: {name!r} is {text[:40]!r}; remove tabs and line breaks, it names a row")
    return text
