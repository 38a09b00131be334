"""What the teacher's passes have captured, kept on disk for later jobs that see the same batches: on a CPU reading them
back is many times faster than the forward (docs/benchmarks.md, "Proxy cohorts").

A cache folder holds one folder for each teacher (weights, dtype, layers, attention, versions: whatever changes a bit),
with parts that one process each appends to: `part-0.bin`, tensors one after the other, and `part-0.jsonl`, what lies
where. A batch is found by the hash of its token ids, so that seed, order and number of ranks need no bookkeeping. An
entry is written after its tensors; what a killed process left behind its last entry is overwritten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from engine.config.distill import ATTENTION_MAPPED, HIDDEN_MAPPED
from engine.config.marks import teacher_settings
from engine.config.proxy import ProxyJobConfig
from engine.data.batch import Batch
from engine.errors import UserError
from engine.jobs.distill.build import load_teacher
from engine.jobs.distill.plan import Plan
from engine.jobs.proxy.plan import code_version
from engine.kernels.segments import segments_of_lengths
from engine.models.features import Features, Wanted
from engine.models.hub import model_hashes
from engine.models.projections import EMBEDDINGS
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import Runtime
from engine.records.files import AppendFile
from engine.records.fingerprints import digest
from engine.records.flock import Flock, try_flock

KINDS = ("hidden", "query", "key", "value")
ALIGNED = 64
GIB = 2**30


@dataclass(frozen=True)
class Piece:
    """One captured tensor of every entry."""

    kind: str
    layer: int
    heads: int
    """0: a hidden state"""
    width: int
    """Of the hidden state, or of a head"""

    @property
    def per_token(self) -> int:
        return self.width * max(1, self.heads)


@dataclass(frozen=True)
class Entry:
    data: Path
    at: int
    """Offset of its first tensor, in bytes."""
    rows: tuple[int, int]
    """Sequences and their length; (1, T) without pads, T as in Features."""
    lengths: tuple[int, ...] | None
    """Of the sequences, without pads."""
    pieces: tuple[Piece, ...]
    scaling: dict[int, float]


class CachedTeacher:
    """A FrozenTeacher whose passes are read from disk where they can be, and written there where not."""

    def __init__(self, teacher: FrozenTeacher, folder: Path, *, limit_gib: float, say: Callable[[str], None]) -> None:
        """folder: of this teacher alone. limit_gib: what it may hold; beyond, nothing more is written. Raises
        UserError."""
        self.teacher = teacher
        self._folder, self._limit, self._say = folder, int(limit_gib * GIB), say
        self._known: dict[str, Entry] = {}
        self._read_up_to: dict[Path, int] = {}
        """Of each index, in bytes."""
        self._writer: _Writer | None = None
        self._full = False
        """Whether nothing more is written: too large, or the disk does not take it."""
        self._size = torch.empty((), dtype=teacher.dtype).element_size()
        self.hits = self.misses = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._learn()
        except OSError as error:
            raise UserError(f"proxy.teacher_cache: {folder}: {error.strerror}") from None

    def _learn(self) -> None:
        """Entries that other processes have written since the last look."""
        for index in sorted(self._folder.glob("part-*.jsonl")):
            start = self._read_up_to.get(index, 0)
            if index.stat().st_size > start:
                entries, self._read_up_to[index], _ = _read_index(index, start)
                self._known = entries | self._known

    def flops_per_token(self, seq_len: int, *, head_share: float = 1.0) -> float:
        return self.teacher.flops_per_token(seq_len, head_share=head_share)

    def expect(self, batches: Iterable[Batch], *, ranks: int = 1) -> None:
        """Says what of these is there already, and how much will be written; batches: those of one of so many ranks."""
        found = [(_digest(batch) in self._known, batch) for batch in batches]
        missing = [batch for known, batch in found if not known]
        size = ranks * sum(batch.counts.positions for batch in missing) * self.bytes_per_token()
        held = self.size()
        text = (
            f"teacher cache {self._folder}: {len(found) - len(missing)} of {len(found)} batches, {held / GIB:.2f} GiB"
        )
        if missing:
            text += f"; writing up to {size / GIB:.2f} GiB more"
            if held + size > self._limit:
                text += f", but no more than proxy.teacher_cache_gib={self._limit / GIB:g} allows"
        self._say(text)

    def bytes_per_token(self) -> float:
        """Of all that is captured."""
        wanted, shape = self.teacher.wanted, self.teacher.shape
        tensors = len(wanted.hidden) + len(wanted.attention) * (3 if wanted.values else 2)
        return float(tensors * shape.width * self._size)

    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.stat().st_size for part in self._folder.glob("part-*.bin"))

    def __call__(self, batch: Batch) -> Features:
        key = _digest(batch)
        if key not in self._known:
            self._learn()
        entry = self._known.get(key)
        if entry is not None:
            self.hits += 1
            return self._read(entry)
        self.misses += 1
        features = self.teacher(batch)
        if not self._full:
            try:
                self._write(key, features)
            except OSError as error:
                self._full = True
                self._say(f"teacher cache {self._folder}: {error.strerror}; nothing more is written")
        return features

    def _read(self, entry: Entry) -> Features:
        tokens = entry.rows[0] * entry.rows[1]
        features = Features(scaling=dict(entry.scaling))
        if entry.lengths is not None:
            features.segments = segments_of_lengths(entry.lengths, entry.rows[1])
        # copy on write: PyTorch knows no read-only tensors, and nobody writes to a teacher's
        memory = np.memmap(
            entry.data, mode="c", offset=entry.at, shape=self._span(entry.pieces, tokens), dtype=np.uint8
        )
        at = 0
        for piece in entry.pieces:
            length = tokens * piece.per_token * self._size
            flat = torch.from_numpy(memory[at : at + length]).view(self.teacher.dtype)
            tensor = flat.view(*entry.rows, *((piece.heads, piece.width) if piece.heads else (piece.width,)))
            getattr(features, piece.kind)[piece.layer] = tensor.transpose(1, 2) if piece.heads else tensor
            at += -(-length // ALIGNED) * ALIGNED
        return features

    def _span(self, pieces: Iterable[Piece], tokens: int) -> int:
        return sum(-(-tokens * piece.per_token * self._size // ALIGNED) * ALIGNED for piece in pieces)

    def _write(self, key: str, features: Features) -> None:
        if self._writer is None:
            self._writer = _Writer(self._folder)
        pieces, tensors = [], []
        for kind in KINDS:
            for layer, tensor in sorted(getattr(features, kind).items()):
                flat = tensor if tensor.dim() == 3 else tensor.transpose(1, 2)
                heads = 0 if tensor.dim() == 3 else flat.shape[2]
                pieces.append(Piece(kind, layer, heads, tensor.shape[-1]))
                tensors.append(flat.contiguous())
        rows = tuple(tensors[0].shape[:2])
        self._learn()
        if key in self._known:
            return  # written by another process while this one computed it
        if self.size() + self._span(pieces, rows[0] * rows[1]) > self._limit:
            self._full = True
            return
        lengths = None if features.segments is None else features.segments.lengths
        self._known[key] = self._writer.append(key, tensors, rows, lengths, tuple(pieces), features.scaling)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


AnyTeacher = FrozenTeacher | CachedTeacher


class _Writer:
    """Appends to a part that no other process has."""

    def __init__(self, folder: Path) -> None:
        for number in itertools.count():
            self._data_path, self._index_path = folder / f"part-{number}.bin", folder / f"part-{number}.jsonl"
            is_new = not self._index_path.exists()
            try:
                index = self._index_path.open("x+" if is_new else "a+", encoding="utf-8")
            except FileExistsError:  # made by another process meanwhile
                continue
            lock = try_flock(index)
            if lock is Flock.HELD or (lock is Flock.MISSING and not is_new):  # another process's, or it could be
                index.close()
                continue
            self._index: IO[str] = index
            break
        _, whole, end = _read_index(self._index_path)
        self._index.truncate(whole)  # a torn line
        # unbuffered: what a full disk has refused must not come up again when they are closed
        self._lines, self._data = AppendFile(self._index_path), AppendFile(self._data_path)
        os.truncate(self._data_path, end)
        self._end = end

    def append(
        self,
        key: str,
        tensors: list[torch.Tensor],
        rows: tuple[int, ...],
        lengths: tuple[int, ...] | None,
        pieces: tuple[Piece, ...],
        scaling: dict[int, float],
    ) -> Entry:
        at = self._end
        for tensor in tensors:
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            self._data.append(memoryview(raw))  # type: ignore[arg-type]
            self._data.append(bytes(-len(raw) % ALIGNED))
            self._end += len(raw) + -len(raw) % ALIGNED
        line = {
            "batch": key,
            "at": at,
            "end": self._end,
            "rows": rows,
            "lengths": lengths,
            "pieces": [[p.kind, p.layer, p.heads, p.width] for p in pieces],
            "scaling": scaling,
        }
        self._lines.append(f"{json.dumps(line)}\n".encode())
        return Entry(self._data_path, at, (rows[0], rows[1]), lengths, pieces, dict(scaling))

    def close(self) -> None:
        self._data.close()
        self._lines.close()
        self._index.close()


def _read_index(path: Path, start: int = 0) -> tuple[dict[str, Entry], int, int]:
    """Entries by batch from `start` on, length of the index up to its last whole line, and of the data that it speaks
    of."""
    entries: dict[str, Entry] = {}
    whole, end = start, 0
    data = path.with_suffix(".bin")
    held = data.stat().st_size if data.exists() else 0
    for line in path.read_bytes()[start:].splitlines(keepends=True):
        try:
            fields: dict[str, Any] = json.loads(line)
            entry = Entry(
                data,
                fields["at"],
                (fields["rows"][0], fields["rows"][1]),
                None if fields["lengths"] is None else tuple(fields["lengths"]),
                tuple(Piece(*piece) for piece in fields["pieces"]),
                {int(layer): factor for layer, factor in fields["scaling"].items()},
            )
        except (ValueError, KeyError, TypeError):
            break
        if fields["end"] > held or not line.endswith(b"\n"):
            break
        entries[fields["batch"]] = entry
        whole, end = whole + len(line), fields["end"]
    return entries, whole, end


def _digest(batch: Batch) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in (batch.input_ids, batch.attention_mask, batch.token_types):
        if tensor is not None:
            hashed.update(repr(tuple(tensor.shape)).encode())
            hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def open_cached_teacher(
    config: ProxyJobConfig, plan: Plan, runtime: Runtime, *, say: Callable[[str], None]
) -> CachedTeacher:
    """The proxy's teacher, with every layer that any mapping could need. Raises UserError for what cannot be cached."""
    assert config.proxy.teacher_cache is not None
    given = f"proxy.teacher_cache={config.proxy.teacher_cache!r}"
    if runtime.device.type != "cpu":
        raise UserError(
            f"{given}: a GPU's teacher is faster than any disk (an H100 would have to read 72 GB/s); remove it"
        )
    if config.loss.logits > 0:
        raise UserError(f"{given}: logits over a vocabulary are too large to keep; write loss.logits=0, or remove it")
    if config.teacher.placement == "zero3" and runtime.world_size > 1:
        raise UserError(
            f"{given}: with teacher.placement=zero3 every rank must take part in every pass of the teacher; write "
            "teacher.placement=replicate, or remove it"
        )
    wanted = any_mapping_wants(config, plan)
    if wanted == Wanted():
        raise UserError(f"{given}: no loss looks at the teacher's layers, so there is nothing to keep; remove it")
    resolved: dict[str, Any] = {
        "teacher.path": model_hashes("teacher", plan.teacher),
        "teacher.dtype": plan.teacher_dtype,
        "teacher.attention": plan.teacher_attention.name,
        "kernels.unpadded": plan.unpadded,
    }
    facts = {
        **{key: resolved[key] for key in teacher_settings(config)},
        "hidden": sorted(wanted.hidden),
        "queries and keys": sorted(wanted.attention),
        "values": wanted.values,
        "code": code_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": runtime.threads,
    }
    folder = Path(config.proxy.teacher_cache) / digest(facts)
    teacher = load_teacher(plan, wanted, runtime.device)
    return CachedTeacher(teacher, folder, limit_gib=config.proxy.teacher_cache_gib, say=say)


def any_mapping_wants(config: ProxyJobConfig, plan: Plan) -> Wanted:
    """What the losses of `config` could need of the teacher, whatever the mapping."""
    active, layers = config.loss.active, frozenset(range(1, plan.teacher_shape.layers + 1))
    hidden = layers if set(HIDDEN_MAPPED) & set(active) else frozenset[int]()
    if "embedding" in active:
        hidden |= {EMBEDDINGS}
    attention = layers if set(ATTENTION_MAPPED) & set(active) else frozenset[int]()
    values = "relation" in active and config.loss.relation_weights[2] > 0
    return Wanted(hidden=hidden, attention=attention, values=values)
