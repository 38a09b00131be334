"""What other programs read of a job: JSON lines in records.jsonl; and behind `@record ` on stdout those of a job that a
search reads, and those that the file has no room for. Writer and parser side by side.

Kinds: run (start and end of a run), step, checkpoint, result, error. Numbers that JSON cannot hold (nan, inf) are
written as null beside `"status"`, never as invalid JSON.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from engine.errors import RunFailure
from engine.records.files import AppendFile

SENTINEL = "@record "
VERSION = 1
KINDS = ("run", "step", "checkpoint", "result", "error")
OnRecord = Callable[[dict[str, Any]], None]
"""Function that is called with records as `read_records` returns them."""


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _as_json(kind: str, **fields: Any) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown record kind {kind!r}; known: {', '.join(KINDS)}")
    return json.dumps({"v": VERSION, "kind": kind, **_finite(fields)}, allow_nan=False, sort_keys=True)


def format_record(kind: str, **fields: Any) -> str:
    """Returns the line for stdout, without a newline. Raises ValueError for an unknown kind, TypeError for what JSON
    cannot hold."""
    return SENTINEL + _as_json(kind, **fields)


def parse_record(line: str) -> dict[str, Any] | None:
    """Returns the record in a line of records.jsonl or of stdout, or None. There it may stand behind any prefix
    (`host: `, colour codes) and before a glued-on tail; a torn line (the writer died half-way) gives None."""
    payload = line[line.index(SENTINEL) + len(SENTINEL) :] if SENTINEL in line else line
    if not payload.startswith("{"):
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(payload)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or record.get("v") != VERSION or record.get("kind") not in KINDS:
        return None
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns all readable records of a log or a records.jsonl, in order."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [record for line in lines if (record := parse_record(line)) is not None]


def final_result(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the `result` of the last start, or None while (or because) it has none: an older start's does not
    count."""
    result: dict[str, Any] | None = None
    for record in records:
        if record["kind"] == "result":
            result = record
        elif record["kind"] == "run" and record.get("status") == "started":
            result = None
    return result


class Stream(Protocol):
    """What records are echoed to."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


class RecordWriter:
    """The writer of a run's records to `path`, one `write` each. Rank 0 owns the only one.

    A record that the disk has no room for leaves no half line, and goes to stdout. The job goes on; when the file can
    be written again, a record of kind run with status `records_lost` says how many are missing. A `result` is not given
    up: it is written before the next record, or at the end.
    """

    def __init__(
        self,
        path: Path,
        *,
        echo: bool = False,
        stream: Stream | None = None,
        tell: Callable[[str], None] | None = None,
        on_record: OnRecord | None = None,
    ) -> None:
        """echo: whether every record goes to the stream, too. stream: in place of stdout. tell: is told when the file
        cannot be written, and when it can again; unset: stdout. on_record: is called with each record after it was
        written."""
        self._echo = echo
        self._stream: Stream = stream if stream is not None else sys.stdout
        self._path, self._tell = path, tell or functools.partial(print, flush=True)
        self._on_record = on_record
        self._file: AppendFile | None = AppendFile(path)
        # a killed writer left half a line: keep ours whole
        self._head = b"\n" if self._file.ends_within_a_line else b""
        self._lost = 0
        self._results: list[bytes] = []
        """Lines of kind result that are not in the file yet."""
        self.error: str | None = None
        """Why the file cannot be written, while it cannot."""

    def write(self, kind: str, **fields: Any) -> None:
        line = _as_json(kind, **fields) + "\n"
        is_kept = self._append(line.encode(), is_result=kind == "result")
        if self._echo or not is_kept:
            self._stream.write(SENTINEL + line)
            self._stream.flush()
        if self._on_record is not None:
            self._on_record(json.loads(line))

    def _append(self, line: bytes, *, is_result: bool) -> bool:
        """Writes what is waiting and a line; returns whether the file has it."""
        assert self._file is not None
        lost = (_as_json("run", status="records_lost", lost=self._lost) + "\n").encode() if self._lost else b""
        try:
            self._file.append(self._head + lost + b"".join(self._results) + line)
        except OSError as error:
            if self.error is None:
                self._tell(f"warning: {self._path} cannot be written ({error.strerror}); the job continues without it")
            self.error = error.strerror or type(error).__name__
            if is_result:
                self._results.append(line)
            elif line:
                self._lost += 1
            return False
        if self.error is not None:
            self._tell(f"{self._path} can be written again; records missing in it: {self._lost}")
        self._head, self._lost, self._results, self.error = b"", 0, [], None
        return True

    def close(self) -> None:
        """Raises RunFailure when a result is not in the file: whoever reads it there would miss it."""
        if self._file is None:
            return
        if self._results:
            self._append(b"", is_result=False)
        self._file.close()
        self._file = None
        if self._results:
            raise RunFailure(
                f"{self._path}: the result is not in it ({self.error}), although the job is done; make room and start "
                "the same command again"
            )
