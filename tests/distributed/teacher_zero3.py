"""Run on each rank: a teacher sharded with ZeRO-3 against the same teacher on each rank.

usage: teacher_zero3.py OUT_DIR MODEL_DIR...   Each rank writes rank<R>.json with what it saw for each model. All but
the last model are tiny, so for them nothing is kept whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.data.batch import Batch, Counts
from engine.models.features import Features, Wanted
from engine.models.hub import SavedModel, shape_of
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import join_ranks
from engine.train import deepspeed_engine
from engine.train.deepspeed_engine import shard_frozen


def largest_difference(left: Features, right: Features) -> float:
    """Of any entry, as a share of the largest of its tensor."""
    worst = 0.0

    def share(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).abs().max() / b.float().abs().max())

    for name in ("hidden", "query", "key", "value"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.keys() == b.keys()
        worst = max([worst, *(share(a[k], b[k]) for k in a)])
    if left.logits is not None and right.logits is not None:
        worst = max(worst, share(left.logits, right.logits))
    return worst


def make_batch(rank: int, vocab: int) -> Batch:
    """Each rank its own data, as in training; one row is padded."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, vocab, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100) * mask - 100 * (1 - mask)
    return Batch(ids, mask, labels, Counts(masked=int((labels != -100).sum())))


def compare(path: str, rank: int, dtype: torch.dtype, logits: bool) -> dict[str, float]:
    saved = SavedModel.read("teacher.path", path)
    layers = shape_of(saved.config, logits).layers
    deepest = layers if logits else layers - 1
    wanted = Wanted(frozenset({0, deepest}), frozenset({1, deepest}), values=True, logits=logits)
    common = {"wanted": wanted, "dtype": dtype, "device": torch.device("cpu"), "backend": "sdpa"}
    whole = FrozenTeacher.load(saved, **common)
    sharded = FrozenTeacher.load(saved, shard=shard_frozen, **common)
    difference = 0.0
    for step in range(3):  # more than once: ZeRO-3 traces the first pass and prefetches in the next
        batch = make_batch(rank + 10 * step, whole.shape.vocab)
        difference = max(difference, largest_difference(whole(batch), sharded(batch)))
    return {
        "difference": difference,
        "whole_bytes": whole.resident_bytes(),
        "sharded_bytes": sharded.resident_bytes(),
        "same_counts": whole.parameters_count == sharded.parameters_count,
        "same_flops": whole.flops_per_token(64) == sharded.flops_per_token(64),
    }


def main() -> None:
    folder, *paths = [word for word in sys.argv[1:] if not word.startswith("--")]  # the launcher adds --local_rank
    out = Path(folder)
    join_ranks(seed=0)
    rank = dist.get_rank()
    result: dict[str, object] = {"world": dist.get_world_size()}
    for path in paths:
        name = Path(path).name
        deepspeed_engine.PERSISTENT_NUMEL = 10_000 if path == paths[-1] else 0  # tiny tensors are to be sharded as well
        for dtype in (torch.float32, torch.bfloat16):
            result[f"{name} {dtype}"] = compare(path, rank, dtype, logits=name.startswith("mlm-"))
    (out / f"rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main()
