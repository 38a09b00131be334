"""What launch/prepare_data.py shows: how far it is while it works, and a summary at the end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from engine.data.manifest import Manifest
from engine.data.prepare.sources import SourceReader

_MB = 1_000_000
_LINE_EVERY_S = 30.0
_KINDS = {
    "text": "plain text",
    "extracted": "text between <doc> and </doc>",
    "json": "JSON lines",
    "table": "CSV or TSV",
    "parquet": "Parquet",
}


@dataclass
class PoolUsage:
    """What one run of the worker pool did and took."""

    kept_shards: int = 0
    """Shards of an earlier run that were not made again."""
    new_tokens: int = 0
    unknown_tokens: int = 0
    """Those of the new ones that stand for text the tokenizer does not know."""
    seconds: float = 0.0
    main_peak_bytes: int = 0
    worker_peak_bytes: dict[int, int] = field(default_factory=dict)
    """Process id -> bytes."""


class TextProgress:
    """Bytes of text done: a bar on a terminal. Elsewhere (a pipe, a log file) a line every 30 s, because the carriage
    returns of a bar make one endless line there."""

    def __init__(self) -> None:
        self.total: int | None = None
        """Bytes of text in all; None when unknown."""
        self._done = 0
        self._began = self._shown = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> TextProgress:
        if sys.stderr.isatty():
            self._bar = tqdm(unit="B", unit_scale=True, desc="prepare", mininterval=0.5, dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, text_bytes: int) -> None:
        self._done += text_bytes
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(text_bytes)
        elif time.monotonic() - self._shown >= _LINE_EVERY_S:
            self._shown = time.monotonic()
            print(self._line(self._shown - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        speed = self._done / seconds
        line = (
            f"prepare: {self._done / _MB:,.1f} MB of text in {tqdm.format_interval(seconds)}, {speed / _MB:,.2f} MB/s"
        )
        if self.total is None:
            return line
        left = tqdm.format_interval((self.total - self._done) / speed)
        return f"{line}; {self._done / self.total:.0%} of about {self.total / _MB:,.1f} MB, {left} left"


def print_sources(readers: Sequence[SourceReader]) -> None:
    """Prints what each source is read as, how its text begins, what of a folder is left out, and what stands in two
    sources. Raises UserError for bad input at its beginning."""
    seen: set[tuple[Path, str]] = set()
    for reader in readers:
        path = reader.source.path
        _print_visibly(f"{path}: {_description(reader)}, beginning: {reader.beginning()}")
        for line in reader.selection.left_out_lines():
            _print_visibly(f"{path}: left out {line}")
        if window := max((contents.window for contents in reader.selection.files.values()), default=0):
            print(f"{path}: unpacking takes {window / _MB:,.0f} MB of memory (a long zstd window)")
        files = {(file.resolve(), reader.source.column) for file in reader.selection.files}
        if again := len(files & seen):
            print(f"{path}: {_count(again, 'file')} of an earlier source, read again (use weight to repeat a source)")
        seen |= files


def _description(reader: SourceReader) -> str:
    source, files = reader.source, reader.selection.files
    if not files:
        stored = "a folder saved by `datasets`" if reader.saved_dataset else "a data set of the hub"
        return f"{stored}, column {source.column!r}"
    kinds = Counter((contents.kind, contents.compression) for contents in files.values())
    shown = [
        f"{_count(number, 'file')} of {_KINDS[kind]}{f' in {compression}' if compression else ''}"
        for (kind, compression), number in kinds.items()
    ]
    has_column = any(kind not in ("text", "extracted") for kind, _ in kinds)
    return ", ".join(shown) + (f", column {source.column!r}" if has_column else "")


def _print_visibly(line: str) -> None:
    """Prints control characters, and what standard output cannot show, as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(shown.encode(encoding, "backslashreplace").decode(encoding))


def print_already_prepared(folder: Path, manifest: Manifest) -> None:
    print(f"{folder}: already prepared with these settings ({manifest.sequences:,} sequences); nothing to do")


def print_summary(folder: Path, manifest: Manifest, readers: Sequence[SourceReader], usage: PoolUsage) -> None:
    print(
        f"{folder}: {_count(manifest.sequences, 'sequence')} of up to {manifest.seq_len} tokens from "
        f"{_count(manifest.documents, 'document')}; {_count(manifest.tokens, 'token')}, fill {manifest.fill:.1%}, "
        f"{_count(len(manifest.shards), 'shard')}"
    )
    if usage.unknown_tokens:
        share = usage.unknown_tokens / usage.new_tokens
        print(f"{share:.2%} of the new tokens are unknown tokens")
    if usage.kept_shards:
        print(f"kept {_count(usage.kept_shards, 'shard')} of an earlier run")
    if dropped := sum(source.dropped for source in manifest.sources):
        print(f"dropped {_count(dropped, 'sequence')} with fewer than min_tokens={manifest.min_tokens} text tokens")
    if cut := sum(source.cut for source in manifest.sources):
        print(f"cut {_count(cut, manifest.unit)} at the end of a sequence of seq_len={manifest.seq_len} tokens")
    for reader in readers:
        if reader.bad_lines:
            shown = ", the first of them" if len(reader.bad_places) < reader.bad_lines else ""
            print(f"{reader.source.path}: skipped {_count(reader.bad_lines, 'bad line')}{shown}:")
        for place in reader.bad_places:
            print(f"  {place}")
    if usage.worker_peak_bytes:
        peaks = usage.worker_peak_bytes.values()
        print(
            f"{usage.new_tokens / usage.seconds:,.0f} tokens/s over {usage.seconds:.1f} s; peak memory: main process "
            f"{usage.main_peak_bytes / _MB:,.0f} MB, workers ({len(peaks)}) {sum(peaks) / _MB:,.0f} MB"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
