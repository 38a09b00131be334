"""The worker processes that turn units of text into shards, and the main process that feeds them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.prepare.progress import PoolUsage, TextProgress
from engine.data.prepare.sources import SourceReader
from engine.data.prepare.units import UnitSettings, WorkUnit, cut_units, pack_unit, plain_tokenizer
from engine.data.shards import ShardInfo, finished_shard, id_type, write_shard
from engine.errors import UserError


@dataclass
class SourceShards:
    """A source and the shards made of it so far, by their number."""

    reader: SourceReader
    shards: dict[int, ShardInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class _Done:
    info: ShardInfo
    unknown: int
    """Tokens that stand for text the tokenizer does not know."""
    worker: int
    peak_bytes: int


_Waiting = dict[Future[_Done], tuple[SourceShards, WorkUnit]]


class ShardPool:
    """Worker processes that make the missing shards of all sources, `unit_bytes` of text each.

    Memory: (2 * workers + 3) units, and per worker the tokenizer and one unit's tokens.
    """

    def __init__(
        self,
        folder: Path,
        settings: UnitSettings,
        *,
        tokenizer_json: str,
        unknown: int | None,
        unit_bytes: int,
        workers: int | None,
    ) -> None:
        """unknown: id of the tokenizer's token for what it does not know; None: it has none."""
        self._folder, self._settings = folder, settings
        self._json, self._unknown = tokenizer_json, unknown
        self._unit_bytes = unit_bytes
        self._workers = workers or len(os.sched_getaffinity(0))
        self._usage = PoolUsage()

    def process(self, sources: list[SourceShards]) -> PoolUsage:
        """Fills in `shards` of each source. Raises UserError when a worker dies."""
        began = time.monotonic()
        others = set(multiprocessing.active_children())
        # spawn: a fork would copy locks held by torch's or tokenizers' threads
        pool = ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._json, str(self._folder), self._settings, self._unknown),
        )
        try:
            self._feed(pool, sources)
        except BrokenProcessPool as error:
            _unblock(pool)
            raise UserError(
                "a worker process died (killed, or out of memory?); finished shards are kept, start the same command "
                "again; fewer --workers or a smaller --shard_mb need less memory"
            ) from error
        except BaseException:  # bad input, Ctrl-C, SIGTERM
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # shards are written whole or not at all, so only the units at work are lost
            _unblock(pool)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self._usage.seconds = time.monotonic() - began
        self._usage.main_peak_bytes = _peak_bytes()
        return self._usage

    def _feed(self, pool: ProcessPoolExecutor, sources: list[SourceShards]) -> None:
        limit = 2 * self._workers  # one in work and one waiting per worker bounds the memory
        waiting: _Waiting = {}
        totals = [source.reader.raw_total for source in sources]
        index = text_bytes = 0
        with TextProgress() as progress:
            for source in sources:
                for unit in cut_units(source.reader, unit_bytes=self._unit_bytes, first_index=index):
                    index = unit.index + 1
                    text_bytes += len(unit.text)
                    if all(totals):  # files: guess the amount of text from the share of their bytes that was read
                        raw = sum(s.reader.raw_done for s in sources)
                        progress.total = max(text_bytes, round(text_bytes * sum(t or 0 for t in totals) / max(1, raw)))
                    info = finished_shard(self._folder, unit.index, self._settings.key(unit))
                    if info is not None:
                        source.shards[unit.index] = info
                        self._usage.kept_shards += 1
                        progress.advance(len(unit.text))
                        continue
                    while len(waiting) >= limit:
                        self._collect(waiting, progress)
                    waiting[pool.submit(_work, unit)] = (source, unit)
            progress.total = text_bytes
            while waiting:
                self._collect(waiting, progress)

    def _collect(self, waiting: _Waiting, progress: TextProgress) -> None:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            done = future.result()
            source, unit = waiting.pop(future)
            source.shards[unit.index] = done.info
            self._usage.worker_peak_bytes[done.worker] = done.peak_bytes
            self._usage.new_tokens += done.info.tokens
            self._usage.unknown_tokens += done.unknown
            progress.advance(len(unit.text))


def _unblock(pool: ProcessPoolExecutor) -> None:
    """Lets a pool whose workers are dead shut down."""
    # until Python >= 3.11.5 (Debian 12 has 3.11.2): the shutdown waits for ever for a thread that writes a unit of text
    # into a pipe that nobody reads (github.com/python/cpython/issues/94777)
    if sys.version_info < (3, 11, 5):
        reader: Any = pool._call_queue._reader  # type: ignore[attr-defined]
        reader.close()  # the last reader: the write fails, and the thread ends


@dataclass(frozen=True)
class _Worker:
    backend: Any
    folder: Path
    settings: UnitSettings
    unknown: int | None


_worker: _Worker | None = None


def _start_worker(tokenizer_json: str, folder: str, settings: UnitSettings, unknown: int | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the main process acts on it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = _Worker(plain_tokenizer(tokenizer_json), Path(folder), settings, unknown)


def _die_with_parent() -> None:
    """Ends this worker with its main process, which could not do so where it was SIGKILLed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(unit: WorkUnit) -> _Done:
    assert _worker is not None
    settings = _worker.settings
    packer = pack_unit(_worker.backend, unit, settings)
    prefix, suffix = (np.array(ids, dtype=np.int32) for ids in (settings.special.prefix, settings.special.suffix))
    sequences = [np.concatenate([prefix, tokens, suffix]) for tokens in packer.sequences]
    info = write_shard(
        _worker.folder,
        unit.index,
        settings.key(unit),
        sequences,
        dtype=id_type(settings.vocab_size),
        dropped=packer.dropped,
        cut=packer.cut,
    )
    unknown = sum(int(np.count_nonzero(tokens == _worker.unknown)) for tokens in packer.sequences)
    return _Done(info, unknown, os.getpid(), _peak_bytes())


def _peak_bytes() -> int:
    """Returns the largest resident memory of this process. VmHWM, because ru_maxrss of a spawned process includes its
    parent's."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
