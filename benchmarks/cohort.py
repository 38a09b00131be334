"""What a genome costs when K students share one teacher pass, and when that pass is read from a cache instead.

    python benchmarks/cohort.py                                  # 12 x 768 to 4 x 312, batch 8 x 128 on a CPU

One step of every student of a cohort, as a proxy job does it (benchmarks/cohort_jobs.py measures whole jobs). Cohorts
of all sizes take turns in one process with the same students. Beside the measured gain over students that each have
their own teacher pass is that of the model, K (t + s) / (t + K s), with t (teacher) and s (student, losses, optimizer)
measured in the same turns. Peak memory is that of two steps, in a process of its own for each K."""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import base_memory, header, in_a_fresh_process, machine, peak_above
from step import LEVERS, STUDENTS, Ours, make_batch, student_step

from engine.data.batch import Batch
from engine.jobs.measure.turns import take_turns
from engine.jobs.proxy.teacher_cache import CachedTeacher
from engine.ranks.runtime import join_ranks

VOCABULARY = 15000
"""Tokens that a proxy's student has: about what 60 steps of 16 x 128 tokens meet of BERT's 30,522."""
BATCHES = 4
"""In the cache, so that none is always the newest in the processor's own."""


def cohort_step(teacher: Any, engines: list[Any], batch: Batch) -> None:
    features = teacher(batch)
    for engine in engines:
        student_step(engine, batch, features, last_user=engine is engines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--student", choices=STUDENTS, default="4x312")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    outside = dict(os.environ)
    device = join_ranks(0).device
    ours = Ours(LEVERS[-1], args.student, args.length, args.batch, device, vocabulary=VOCABULARY)
    batch = make_batch(args.batch, args.length, 0.0, device, vocabulary=VOCABULARY)
    if args.memory:
        base = base_memory(device)
        teacher, engines = ours.teacher(), [ours.model() for _ in range(args.memory)]
        print(json.dumps(peak_above(base, lambda: [cohort_step(teacher, engines, batch) for _ in range(2)], device)))
        return
    teacher, engines = ours.teacher(), [ours.model() for _ in range(max(args.sizes))]
    steps: dict[str, Any] = {
        f"{size}": functools.partial(cohort_step, teacher, engines[:size], batch) for size in args.sizes
    }
    features = teacher(batch)
    steps["teacher"] = lambda: teacher(batch)
    steps["student"] = lambda: student_step(engines[0], batch, features)
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cpu":
            cached = CachedTeacher(teacher, Path(folder), limit_gib=4.0, say=lambda _: None)
            others = [
                make_batch(args.batch, args.length, 0.0, device, seed=i, vocabulary=VOCABULARY) for i in range(BATCHES)
            ]
            turns = itertools.cycle(others)
            for other in others:
                cached(other)
            steps["cached"] = lambda: cohort_step(cached, engines[:1], next(turns))
        times = take_turns(steps, args.rounds, device)
        if device.type == "cpu":
            assert cached.misses == BATCHES
            kept = cached.size() / BATCHES / batch.counts.tokens
    steps.clear()
    engines.clear()
    gc.collect()
    t, s = times["teacher"].ms, times["student"].ms
    print(machine(device, ["transformers", "deepspeed"]))
    print(
        f"12 x 768 to {args.student}, {STUDENTS[args.student][0]}, {VOCABULARY:,} tokens, bf16, batch {args.batch} x "
        f"{args.length}, {args.rounds} rounds: t {t:.0f} ms, s {s:.0f} ms\n"
    )
    print(header("K", "step, ms", "ms a genome", "times cheaper (min to max)", "model", "peak MiB"))
    single = times["1"]
    for size in args.sizes:
        took = times[f"{size}"]
        ratios = sorted(size * one / all_ for one, all_ in zip(single.wall, took.wall, strict=True))
        gain = f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        model = size * (t + s) / (t + size * s)
        peak = in_a_fresh_process(*sys.argv[1:], "--memory", str(size), env=outside)
        print(f"| {size} | {took.ms:.0f} | {took.ms / size:.0f} | {gain} | {model:.2f} | {peak:,.0f} |", flush=True)
    if "cached" in times:
        took = times["cached"]
        print(f"| 1, cached | {took.ms:.0f} | {took.ms:.0f} | {took.ratio_to(single)} | {(t + s) / s:.2f} | |")
        print(f"\nThe cache holds {kept / 1000:.1f} kB a token.")


if __name__ == "__main__":
    main()
