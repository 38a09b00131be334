"""Corpus preparation: raw text -> packed, memory-mapped shards and a manifest.

The main process streams text (sources.py) and cuts it into work units of about `shard_mb` (units.py); worker processes
turn each unit into one shard (shard_pool.py). The manifest is written last.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config.tools import PrepareConfig
from engine.data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, load_manifest
from engine.data.prepare.progress import print_already_prepared, print_sources, print_summary
from engine.data.prepare.shard_pool import ShardPool, SourceShards
from engine.data.prepare.sources import SourceReader
from engine.data.prepare.units import UnitSettings, unit_settings
from engine.data.shards import remove_strays, shard_name
from engine.errors import Preempted, UserError
from engine.hub.tokenizer import load_tokenizer
from engine.records.flock import Flock, no_locks_text, try_flock

LOCK = ".lock"


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the corpus that `config` describes and returns its manifest.

    Started again after an interruption it redoes only the missing shards; with everything done it returns at once.
    Raises UserError for bad input. Memory: (2 * workers + 3) units of text, at most three times `shard_mb` each, and
    per worker the tokenizer and one unit's tokens; independent of the size of the corpus.
    """
    if not config.sources:
        raise UserError("sources=[]: name at least one text file, folder or data set")
    folder = Path(config.output_dir)
    unit_bytes = config.shard_mb * 1_000_000
    tokenizer = load_tokenizer(config.tokenizer, "tokenizer")
    settings = unit_settings(config, tokenizer)
    readers = [
        SourceReader(source, max_line_bytes=unit_bytes, skip_bad=config.on_bad_line == "skip")
        for source in config.sources
    ]
    done = _already_prepared(folder, config, settings, readers)
    if done is not None:
        print_already_prepared(folder, done)
        return done
    print_sources(readers)  # reads the first lines: an error in these leaves an earlier corpus as it is
    with _new_folder(folder), _locked(folder), _stoppable(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_strays(folder, shards=sys.maxsize)
        sources = [SourceShards(reader) for reader in readers]
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        pool = ShardPool(
            folder,
            settings,
            tokenizer_json=tokenizer_json,
            unknown=tokenizer.unk_token_id,
            unit_bytes=unit_bytes,
            workers=config.workers,
        )
        usage = pool.process(sources)
        if not any(info.sequences for source in sources for info in source.shards.values()):
            remove_strays(folder, shards=0)
        manifest = _manifest(config, settings, sources)
        remove_strays(folder, shards=len(manifest.shards))
        manifest.write(folder)
    print_summary(folder, manifest, readers, usage)
    return manifest


def _manifest(config: PrepareConfig, settings: UnitSettings, sources: list[SourceShards]) -> Manifest:
    entries, shards = [], []
    for number, progress in enumerate(sources):
        infos = progress.shards.values()
        source = progress.reader.source
        sequences = sum(info.sequences for info in infos)
        if sequences == 0:
            raise UserError(
                f"{source.path}: gave no sequence of at least min_tokens={settings.min_tokens} tokens; lower "
                "min_tokens or remove the source"
            )
        entries.append(
            SourceEntry(
                path=source.path,
                weight=source.weight,
                sha256=progress.reader.digest(),
                stamp=progress.reader.stamp(),
                documents=progress.reader.documents,
                sequences=sequences,
                tokens=sum(info.tokens for info in infos),
                dropped=sum(info.dropped for info in infos),
                cut=sum(info.cut for info in infos),
                bad_lines=progress.reader.bad_lines,
            )
        )
        shards += [
            ShardEntry(
                file=shard_name(index),
                source=number,
                sequences=info.sequences,
                tokens=info.tokens,
                size=info.size,
                sha256=info.sha256,
            )
            for index, info in sorted(progress.shards.items())
        ]
    return Manifest(**_header(config, settings), sources=entries, shards=shards)


def _header(config: PrepareConfig, settings: UnitSettings) -> dict[str, Any]:
    return {
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": settings.tokenizer_sha256,
        "vocab_size": settings.vocab_size,
        "seq_len": config.seq_len,
        "pack": config.pack,
        "unit": config.unit,
        "short_seq_prob": config.short_seq_prob,
        "min_tokens": settings.min_tokens,
        "shard_mb": config.shard_mb,
        "seed": config.seed,
        "on_bad_line": config.on_bad_line,
    }


def _already_prepared(
    folder: Path, config: PrepareConfig, settings: UnitSettings, readers: list[SourceReader]
) -> Manifest | None:
    try:
        manifest = load_manifest(folder)
    except UserError:
        return None
    header = _header(config, settings)
    del header["tokenizer"]  # the same tokenizer may lie elsewhere
    same = (
        all(getattr(manifest, name) == value for name, value in header.items())
        and [(s.path, s.weight, s.stamp) for s in manifest.sources]
        == [(r.source.path, r.source.weight, r.stamp()) for r in readers]
        and all((folder / s.file).is_file() and (folder / s.file).stat().st_size == s.size for s in manifest.shards)
    )
    return manifest if same else None


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder. After an error, what it has made and nothing was written to goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a folder is not empty: finished shards, or another process's files
            for path in new:
                path.rmdir()
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second writer out of a folder. The lock dies with its process, so a killed run leaves none behind."""
    with (folder / LOCK).open("w") as file:
        lock = try_flock(file)
        if lock is Flock.HELD:
            raise UserError(f"output_dir={str(folder)!r}: another prepare_data.py is writing there")
        if lock is Flock.MISSING:
            print(no_locks_text(folder, "a second prepare_data.py would not be noticed: do not start one"))
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            raise


@contextlib.contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Lets SIGTERM unwind like Ctrl-C, so that the workers are ended too; both end with the code of a job that can be
    continued."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` and schedulers send it twice: let the pool close
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print(f"{folder}: stopped; finished shards are kept, the same command continues", file=sys.stderr)
        raise Preempted(f"{folder}: stopped; the same call continues") from None
    finally:
        signal.signal(signal.SIGTERM, before)
