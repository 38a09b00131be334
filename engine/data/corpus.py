"""Corpus preparation: raw text -> packed, memory-mapped shards and a manifest.

The main process streams text and cuts it into work units of about `shard_mb`; worker processes turn each unit into one
shard. A unit's shard depends on nothing but its text, its number and the settings, so neither the number of workers
nor an interruption changes a byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from engine.config import PrepareConfig
from engine.data.manifest import MANIFEST, Manifest, ShardEntry, SourceEntry, load_manifest, tokenizer_sha256
from engine.data.packing import Packer, SpecialTokens, special_tokens, tokenize
from engine.data.shards import ShardInfo, finished_shard, id_type, remove_strays, shard_name, write_shard
from engine.data.sources import SourceReader
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MB = 1_000_000
_FORMAT = 1  # part of every shard's key: raise it when packing changes


@dataclass(frozen=True, kw_only=True)
class UnitSettings:
    """All that decides a shard's bytes, beside its text and its number."""

    tokenizer_sha256: str
    vocab_size: int
    special: SpecialTokens
    seq_len: int
    pack: str
    unit: str
    short_seq_prob: float
    min_tokens: int
    seed: int
    format: int = _FORMAT

    @property
    def capacity(self) -> int:
        """Text tokens in a full sequence."""
        return self.seq_len - len(self.special.prefix) - len(self.special.suffix)

    def key(self, unit: WorkUnit) -> str:
        """Identifies the shard that `unit` becomes."""
        head = json.dumps([asdict(self), unit.index], sort_keys=True).encode()
        return hashlib.sha256(head + b"\n" + unit.text).hexdigest()


@dataclass(frozen=True)
class WorkUnit:
    """The text of one shard: paragraphs on lines of their own, an empty line between documents."""

    index: int
    text: bytes


@dataclass
class _Progress:
    """What the main process knows about one source while it reads it."""

    reader: SourceReader
    shards: dict[int, ShardInfo] = field(default_factory=dict)


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the corpus that `config` describes and returns its manifest.

    Started again after an interruption it redoes only the missing shards; with everything done it returns at once.
    Raises UserError for bad input. Memory: (2 * workers + 3) units of text, at most three times `shard_mb` each, and
    per worker the tokenizer and one unit's tokens; independent of the size of the corpus.
    """
    if not config.sources:
        raise UserError("sources=[]: name at least one text file, folder or data set")
    folder = Path(config.output_dir)
    tokenizer = load_tokenizer(config.tokenizer)
    settings = unit_settings(config, tokenizer)
    readers = [
        SourceReader(source, max_line_bytes=config.shard_mb * MB, skip_bad=config.on_bad_line == "skip")
        for source in config.sources
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), _terminate_as_exception():
        done = _already_prepared(folder, config, settings, readers)
        if done is not None:
            print(f"{folder}: already prepared with these settings ({done.sequences} sequences); nothing to do")
            return done
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_strays(folder, shards=sys.maxsize)
        sources = [_Progress(reader) for reader in readers]
        run = _Run(folder, config, settings, tokenizer.backend_tokenizer.to_str())
        run.process(sources)
        manifest = _manifest(config, settings, sources)
        remove_strays(folder, shards=len(manifest.shards))
        manifest.write(folder)
    run.print_summary(manifest, readers)
    return manifest


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder or hub name, or a UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and its own here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer={path!r}: cannot be loaded ({reason}); give a model folder or hub name") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer={path!r}: has no fast version (tokenizer.json); convert it first")
    return tokenizer


def unit_settings(config: PrepareConfig, tokenizer: PreTrainedTokenizerBase) -> UnitSettings:
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    settings = UnitSettings(
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        special=special_tokens(
            _plain(tokenizer.backend_tokenizer.to_str()),
            separator,
            reserved=tokenizer.all_special_ids,
            unknown=tokenizer.unk_token_id,
        ),
        seq_len=config.seq_len,
        pack=config.pack,
        unit=config.unit,
        short_seq_prob=config.short_seq_prob,
        min_tokens=config.min_tokens,
        seed=config.seed,
    )
    if config.min_tokens > settings.capacity:
        raise UserError(
            f"min_tokens={config.min_tokens}: a sequence of seq_len={config.seq_len} holds only {settings.capacity} "
            "text tokens; lower min_tokens or raise seq_len"
        )
    return settings


def cut_units(reader: SourceReader, *, unit_bytes: int, first_index: int) -> Iterator[WorkUnit]:
    """Groups the paragraphs of a source. A unit ends before the first document after `unit_bytes`, or inside a
    document after twice as much. So it holds at most three times `unit_bytes` (a line has at most one)."""
    buffer = bytearray()
    index = first_index
    for paragraph in reader:
        if len(buffer) >= (unit_bytes if paragraph.first else 2 * unit_bytes):
            yield WorkUnit(index, bytes(buffer))
            index += 1
            buffer.clear()
        if buffer:
            buffer += b"\n\n" if paragraph.first else b"\n"
        buffer += paragraph.text.encode()
    if buffer:
        yield WorkUnit(index, bytes(buffer))


def pack_unit(backend: Any, unit: WorkUnit, settings: UnitSettings) -> Packer:
    """Tokenises and packs one unit; its sequences still lack the special tokens around them."""
    packer = Packer(
        capacity=settings.capacity,
        pack=settings.pack,
        unit=settings.unit,
        separator=settings.special.separator,
        short_seq_prob=settings.short_seq_prob,
        min_tokens=settings.min_tokens,
        rng=np.random.default_rng([settings.seed, unit.index]),
    )
    documents = [document.split("\n") for document in unit.text.decode().split("\n\n")]
    for document in tokenize(backend, documents, settings.special):
        packer.add_document(document)
    packer.finish()
    return packer


@dataclass(frozen=True)
class _Done:
    info: ShardInfo
    worker: int
    peak_bytes: int


class _Run:
    """One run of the worker pool over all sources."""

    def __init__(self, folder: Path, config: PrepareConfig, settings: UnitSettings, tokenizer_json: str) -> None:
        self._folder, self._config, self._settings, self._json = folder, config, settings, tokenizer_json
        self._workers = config.workers or len(os.sched_getaffinity(0))
        self._peaks: dict[int, int] = {}
        self._kept = self._new_tokens = 0
        self._began = time.monotonic()
        self._seconds = 0.0

    def process(self, sources: list[_Progress]) -> None:
        others = set(multiprocessing.active_children())
        # spawn: a fork would copy locks held by torch's or tokenizers' threads
        pool = ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._json, str(self._folder), self._settings),
        )
        try:
            self._feed(pool, sources)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (killed, or out of memory?); finished shards are kept, start the same command "
                "again; fewer --workers or a smaller --shard_mb need less memory"
            ) from error
        except BaseException:  # bad input, Ctrl-C, SIGTERM
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # shards are written whole or not at all, so only the units at work are lost
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self._seconds = time.monotonic() - self._began

    def _feed(self, pool: ProcessPoolExecutor, sources: list[_Progress]) -> None:
        limit = 2 * self._workers  # one in work and one waiting per worker bounds the memory
        waiting: dict[Future[_Done], tuple[_Progress, WorkUnit]] = {}
        total = [progress.reader.raw_total for progress in sources]
        index = text_bytes = 0
        interactive = sys.stderr.isatty()
        with tqdm(
            unit="B", unit_scale=True, desc="prepare", mininterval=0.5 if interactive else 30.0, ascii=not interactive
        ) as bar:
            for progress in sources:
                unit_bytes = self._config.shard_mb * MB
                for unit in cut_units(progress.reader, unit_bytes=unit_bytes, first_index=index):
                    index = unit.index + 1
                    text_bytes += len(unit.text)
                    if all(total):  # files: guess the amount of text from the share of their bytes that was read
                        raw = sum(p.reader.raw_done for p in sources)
                        bar.total = max(text_bytes, round(text_bytes * sum(t or 0 for t in total) / max(1, raw)))
                    info = finished_shard(self._folder, unit.index, self._settings.key(unit))
                    if info is not None:
                        progress.shards[unit.index] = info
                        self._kept += 1
                        bar.update(len(unit.text))
                        continue
                    while len(waiting) >= limit:
                        self._collect(waiting, bar)
                    waiting[pool.submit(_work, unit)] = (progress, unit)
            while waiting:
                self._collect(waiting, bar)
            bar.total = text_bytes

    def _collect(self, waiting: dict[Future[_Done], tuple[_Progress, WorkUnit]], bar: Any) -> None:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            done = future.result()
            progress, unit = waiting.pop(future)
            progress.shards[unit.index] = done.info
            self._peaks[done.worker] = done.peak_bytes
            self._new_tokens += done.info.tokens
            bar.update(len(unit.text))

    def print_summary(self, manifest: Manifest, readers: list[SourceReader]) -> None:
        bad = sum(reader.bad_lines for reader in readers)
        dropped = sum(source.dropped for source in manifest.sources)
        print(
            f"{self._folder}: {manifest.documents} documents, {manifest.sequences} sequences of {manifest.seq_len}, "
            f"{manifest.tokens} tokens, fill {manifest.fill:.1%}, {len(manifest.shards)} shards ({self._kept} kept), "
            f"{dropped} sequences under min_tokens dropped, {bad} bad lines skipped"
        )
        for reader in readers:
            if reader.ignored:
                print(f"{reader.source.path}: {reader.ignored} files with other endings were not read")
            for place in reader.bad_places:
                print(f"skipped {place}")
        if self._peaks:
            workers = sum(self._peaks.values())
            print(
                f"{self._new_tokens / self._seconds:,.0f} tokens/s over {self._seconds:.1f} s; peak memory: main "
                f"{_peak_bytes() / MB:,.0f} MB, {len(self._peaks)} workers {workers / MB:,.0f} MB together "
                f"(largest {max(self._peaks.values()) / MB:,.0f} MB)"
            )


def _manifest(config: PrepareConfig, settings: UnitSettings, sources: list[_Progress]) -> Manifest:
    entries, shards = [], []
    for number, progress in enumerate(sources):
        infos = progress.shards.values()
        source = progress.reader.source
        sequences = sum(info.sequences for info in infos)
        if sequences == 0:
            raise UserError(
                f"{source.path}: gave no sequence of at least min_tokens={config.min_tokens} tokens; lower min_tokens "
                "or remove the source"
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
        "min_tokens": config.min_tokens,
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
def _locked(folder: Path) -> Iterator[None]:
    """One writer a folder. The lock dies with its process, so a killed run leaves none behind."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output_dir={str(folder)!r}: another prepare_data.py is writing there") from None
        yield


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that the workers are ended too."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _peak_bytes() -> int:
    """Largest resident memory of this process. VmHWM, because ru_maxrss of a spawned process includes its parent's."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(tokenizer_json: str) -> Any:
    """The tokenizer without what its file may switch on: truncation and padding (all-MiniLM has both), and reading
    "[SEP]" in a text as the special token."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@dataclass(frozen=True)
class _Worker:
    backend: Any
    folder: Path
    settings: UnitSettings


_worker: _Worker | None = None


def _start_worker(tokenizer_json: str, folder: str, settings: UnitSettings) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the main process acts on it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = _Worker(_plain(tokenizer_json), Path(folder), settings)


def _die_with_parent() -> None:
    """A main process that was SIGKILLed cannot end its workers."""
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
    )
    return _Done(info, os.getpid(), _peak_bytes())
