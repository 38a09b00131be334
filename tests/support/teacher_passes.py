"""A tiny teacher's passes over some batches, and a cache of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny_encoders import make_batch

from engine.data.batch import Batch, Counts
from engine.jobs.proxy.teacher_cache import CachedTeacher
from engine.models.features import Features, Wanted
from engine.models.hub import SavedModel
from engine.models.teacher import FrozenTeacher

KINDS = ("hidden", "query", "key", "value")

WANTED = Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({1, 4}), values=True)


def load(folder: Path, *, dtype: torch.dtype = torch.bfloat16, unpadded: bool = True) -> FrozenTeacher:
    return FrozenTeacher.load(
        SavedModel.read("teacher.path", str(folder)),
        wanted=WANTED,
        dtype=dtype,
        device=torch.device("cpu"),
        backend="sdpa",
        unpadded=unpadded,
    )


def batches(count: int, *, padded: bool = True) -> list[Batch]:
    found = []
    for number in range(count):
        batch = make_batch(padded=padded)
        ids = (batch.input_ids + number) % 40 + 5
        lengths = None if batch.attention_mask is None else tuple(batch.attention_mask.sum(1).tolist())
        counts = Counts(positions=ids.numel())
        found.append(replace(batch, input_ids=ids, lengths=lengths, counts=counts))
    return found


def open_cache(teacher: FrozenTeacher, folder: Path, said: list[str] | None = None, gib: float = 1.0) -> CachedTeacher:
    return CachedTeacher(teacher, folder, limit_gib=gib, say=[].append if said is None else said.append)


def assert_same(want: Features, got: Features) -> None:
    assert want.scaling == got.scaling
    assert (want.segments and want.segments.lengths) == (got.segments and got.segments.lengths)
    for kind in KINDS:
        ours, theirs = getattr(got, kind), getattr(want, kind)
        assert ours.keys() == theirs.keys()
        for layer, tensor in theirs.items():
            assert ours[layer].dtype == tensor.dtype
            assert torch.equal(ours[layer], tensor), (kind, layer)
