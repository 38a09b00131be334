"""What the teacher's passes have captured, kept on disk for later jobs that see the same batches: on a CPU reading them
back is many times faster than the forward (docs/benchmarks.md, "Proxy cohorts").

A cache folder holds one folder for each teacher (weights, dtype, layers, attention, versions: whatever changes a bit),
with the parts of engine/jobs/proxy/cache_files.py. A batch is found by the hash of its token ids, so that seed, order
and number of ranks need no bookkeeping.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config.distill import ATTENTION_MAPPED, HIDDEN_MAPPED
from engine.config.marks import teacher_settings
from engine.config.proxy import ProxyJobConfig
from engine.data.batch import Batch
from engine.errors import UserError
from engine.jobs.distill.build import load_teacher
from engine.jobs.distill.plan import Plan
from engine.jobs.proxy.cache_files import ALIGNED, Entry, PartWriter, Piece, read_index
from engine.jobs.proxy.facts import code_version
from engine.kernels.segments import segments_of_lengths
from engine.models.features import Features, Wanted
from engine.models.hub import model_hashes
from engine.models.projections import EMBEDDINGS
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import Runtime
from engine.records.fingerprints import digest

KINDS = ("hidden", "query", "key", "value")
"""Fields of Features that are kept, in the order in which they are written."""
GIB = 2**30


class CachedTeacher:
    """A FrozenTeacher whose passes are read from disk where they can be, and written there where not."""

    def __init__(self, teacher: FrozenTeacher, folder: Path, *, limit_gib: float, say: Callable[[str], None]) -> None:
        """Opens a folder, which is that of this teacher alone. limit_gib: what it may hold; beyond, nothing more is
        written. say: prints a line. Raises UserError where there can be no such folder."""
        self.teacher = teacher
        self._folder, self._limit, self._say = folder, int(limit_gib * GIB), say
        self._known: dict[str, Entry] = {}
        self._read_up_to: dict[Path, int] = {}
        """Bytes that are read of each index."""
        self._writer: PartWriter | None = None
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
        """Reads the entries that other processes have written since the last look."""
        for index in sorted(self._folder.glob("part-*.jsonl")):
            start = self._read_up_to.get(index, 0)
            if index.stat().st_size > start:
                entries, self._read_up_to[index], _ = read_index(index, start)
                self._known = entries | self._known

    def flops_per_token(self, seq_len: int, *, head_share: float = 1.0) -> float:
        """Returns the FLOPs of a forward pass for a token, as if nothing were read."""
        return self.teacher.flops_per_token(seq_len, head_share=head_share)

    def expect(self, batches: Iterable[Batch], *, ranks: int = 1) -> None:
        """Prints how many of these batches are there already, and how much will be written. batches: those of one of so
        many ranks."""
        listed = [(_digest(batch) in self._known, batch) for batch in batches]
        missing = [batch for is_known, batch in listed if not is_known]
        size = ranks * sum(batch.counts.positions for batch in missing) * self.bytes_per_token()
        size_now, known = self.size(), len(listed) - len(missing)
        text = f"teacher cache {self._folder}: {known} of {len(listed)} batches, {size_now / GIB:.2f} GiB"
        if missing:
            text += f"; writing up to {size / GIB:.2f} GiB more"
            if size_now + size > self._limit:
                text += f", but no more than proxy.teacher_cache_gib={self._limit / GIB:g} allows"
        self._say(text)

    def bytes_per_token(self) -> float:
        """Returns the bytes of all that is captured of a token."""
        wanted, shape = self.teacher.wanted, self.teacher.shape
        tensors = len(wanted.hidden) + len(wanted.attention) * (3 if wanted.values else 2)
        return float(tensors * shape.width * self._size)

    def size(self) -> int:
        """Returns the bytes of all parts."""
        return sum(part.stat().st_size for part in self._folder.glob("part-*.bin"))

    def __call__(self, batch: Batch) -> Features:
        """Returns what FrozenTeacher captures of a batch."""
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
        """Writes what was captured of a batch, unless another process has, or there is no room. Raises OSError."""
        if self._writer is None:
            self._writer = PartWriter(self._folder)
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
        """Lets another process append to this one's part."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


AnyTeacher = FrozenTeacher | CachedTeacher


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
    """Returns the proxy's teacher, with every layer that any mapping could need. Raises UserError for what cannot be
    cached."""
    assert config.proxy.teacher_cache is not None
    given = f"proxy.teacher_cache={config.proxy.teacher_cache!r}"
    if runtime.device.type != "cpu":
        raise UserError(
            f"{given}: a GPU's teacher is faster than any disk (an H100 would have to read 72 GB/s); remove it"
        )
    if plan.own_losses:
        raise UserError(f"{given}: it is unknown which tensors own losses need under another mapping; remove it")
    if config.loss.logits > 0:
        raise UserError(f"{given}: logits over a vocabulary are too large to keep; write loss.logits=0, or remove it")
    if config.teacher.placement == "zero3" and runtime.world_size > 1:
        raise UserError(
            f"{given}: with teacher.placement=zero3 every rank must take part in every pass of the teacher; write "
            "teacher.placement=replicate, or remove it"
        )
    wanted = wanted_by_any_mapping(config, plan)
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


def wanted_by_any_mapping(config: ProxyJobConfig, plan: Plan) -> Wanted:
    """Returns what the losses of `config` could need of the teacher, whatever the mapping."""
    active, layers = config.loss.active, frozenset(range(1, plan.teacher_shape.layers + 1))
    hidden = layers if set(HIDDEN_MAPPED) & set(active) else frozenset[int]()
    if "embedding" in active:
        hidden |= {EMBEDDINGS}
    attention = layers if set(ATTENTION_MAPPED) & set(active) else frozenset[int]()
    values = "relation" in active and config.loss.relation_weights[2] > 0
    return Wanted(hidden=hidden, attention=attention, values=values)
