"""The log-line format that other programs read: `@record {json}`. Writer and parser side by side.

Kinds: run (start and end of a run), step, checkpoint, result, error. Numbers that JSON cannot hold (nan, inf) are
written as null beside `"status"`, never as invalid JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import IO, Any

SENTINEL = "@record "
VERSION = 1
KINDS = ("run", "step", "checkpoint", "result", "error")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def format_record(kind: str, **fields: Any) -> str:
    """One line without a newline. Raises ValueError for an unknown kind, TypeError for what JSON cannot hold."""
    if kind not in KINDS:
        raise ValueError(f"unknown record kind {kind!r}; known: {', '.join(KINDS)}")
    return SENTINEL + json.dumps({"v": VERSION, "kind": kind, **_finite(fields)}, allow_nan=False, sort_keys=True)


def parse_record(line: str) -> dict[str, Any] | None:
    """The record in `line`, or None. Works behind any prefix (`host: `, colour codes) and with a glued-on tail;
    a torn line (the writer died half-way) gives None."""
    _, found, payload = line.partition(SENTINEL)
    if not found:
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(payload)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or record.get("v") != VERSION or record.get("kind") not in KINDS:
        return None
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """All readable records of a log or a records.jsonl, in order."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [record for line in lines if (record := parse_record(line)) is not None]


def final_result(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The `result` of the last start, or None while (or because) that has none: an older start's does not count."""
    result: dict[str, Any] | None = None
    for record in records:
        if record["kind"] == "result":
            result = record
        elif record["kind"] == "run" and record.get("status") == "started":
            result = None
    return result


class RecordWriter:
    """Writes each record to stdout and appends it to `path`, one flushed `write` each. Rank 0 owns the only one."""

    def __init__(self, path: Path | None, *, stream: IO[str] | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._file = path.open("a+b") if path is not None else None
        if self._file is not None and self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a killed writer left half a line: keep ours whole
                self._file.write(b"\n")

    def write(self, kind: str, **fields: Any) -> None:
        line = format_record(kind, **fields) + "\n"
        self._stream.write(line)
        self._stream.flush()
        if self._file is not None:
            self._file.write(line.encode())
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
