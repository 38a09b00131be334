"""Batches with their pads and without them: one step of the quick start's teacher and student, by how full batches are.

    taskset -c 0 python benchmarks/unpadded.py --fills 0.95 0.88 0.85 0.81 0.73 0.54

Lengths are drawn evenly around the mean that a fill needs; one sequence of each batch has full length. Both ways
take turns on the same batches in one process: forward pass of teacher and student, losses, backward pass, without the
optimizer. What a run would do with a batch (engine/models/capture.py, FULL_FROM) is switched off here. Further settings
of launch/distill.py follow `--`.

    taskset -c 0 python benchmarks/unpadded.py --grouped -- --config examples/embeddings.yaml --data.path data/sentences

instead compares steps of a corpus with and without data.group_by_length: the same sequences in the first WINDOW steps
(engine/data/grouping.py), each step as a run does it."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from measuring import header, machine

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.data.batch import Batch, Counts
from engine.data.grouping import WINDOW
from engine.jobs.distill.build import build_module, load_teacher, open_corpus
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import Plan, make_plan
from engine.jobs.measure.turns import take_turns
from engine.models.capture import FULL_FROM
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import join_ranks

BATCHES = 8
"""Of each fill; a run meets other lengths in every batch."""


def make_batch(plan: Plan, fill: float, rng: np.random.Generator) -> Batch:
    """Returns a micro batch of random tokens, (B, L) with the plan's B and L."""
    size, length = plan.execution.micro_batch_size, plan.seq_len
    least = max(1, round((2 * fill - 1) * length))
    lengths = rng.integers(least, length, size, endpoint=True)
    lengths[0] = length
    ids = torch.from_numpy(rng.integers(1000, plan.manifest.vocab_size, (size, length)))
    mask = torch.from_numpy((np.arange(length) < lengths[:, None]).astype(np.int64))
    counts = Counts.from_lengths(lengths, windows=plan.losses.windows)
    return Batch(ids * mask, mask, None, counts, lengths=tuple(map(int, lengths)))


def step(
    teacher: FrozenTeacher, module: DistilModule, plan: Plan, batches: Iterator[Batch], device: torch.device
) -> None:
    batch = next(batches).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=plan.execution.precision == "bfloat16"):
        total = module(batch, teacher(batch), batch.counts)[0]
    total.backward()
    module.zero_grad(set_to_none=True)


def compare_orders(teacher: FrozenTeacher, module: DistilModule, plan: Plan, device: torch.device) -> None:
    print(f"{machine(device, ['transformers'])}\n\n{header('group_by_length', 'fill', 'tokens/s', 'times as fast')}")
    ways, fills, tokens = {}, {}, {}
    for grouped in (False, True):
        data = replace(plan.config.data, group_by_length=grouped, verify=False)
        loader = open_corpus(replace(plan, config=replace(plan.config, data=data)))
        batches = [batch for at in range(WINDOW) for batch in loader.step(at).micro]
        tokens[grouped] = sum(batch.counts.tokens for batch in batches)
        fills[grouped] = tokens[grouped] / sum(batch.counts.positions for batch in batches)
        ways[str(grouped)] = functools.partial(run_all, teacher, module, plan, batches, device)
    times = take_turns(ways, 3, device)
    for grouped in (False, True):
        speed = f"{1000 * tokens[grouped] / times[str(grouped)].ms:,.0f}"
        ratio = times[str(grouped)].ratio_to(times["False"]) if grouped else "1"
        print(f"| {grouped} | {fills[grouped]:.2f} | {speed} | {ratio} |")


def run_all(
    teacher: FrozenTeacher, module: DistilModule, plan: Plan, batches: list[Batch], device: torch.device
) -> None:
    turns = iter(batches)
    for _ in batches:
        step(teacher, module, plan, turns, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fills", type=float, nargs="+", default=[0.95, 0.88, 0.85, 0.81, 0.73, 0.54])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--grouped", action="store_true", help="compare data.group_by_length")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--config",
            "examples/quickstart.yaml",
            *args.settings,
            "--output_dir",
            folder,
            "--data.verify",
            "false",
        ]
        plan = make_plan(parse_config(RunConfig, words, "unpadded"))
    device = join_ranks(plan.config.seed).device
    module = build_module(plan, device)[0].to(device).train()
    teacher = load_teacher(plan, plan.losses.wanted_teacher, device)
    if args.grouped:
        compare_orders(teacher, module, plan, device)
        return
    FULL_FROM[device.type] = math.inf
    print(f"{machine(device, ['transformers'])}\n\n{header('fill', 'with pads', 'without', 'times as fast')}")
    for fill in args.fills:
        rng = np.random.default_rng(0)
        batches = [make_batch(plan, fill, rng) for _ in range(BATCHES)]

        def run(unpadded: bool, turns: Iterator[Batch]) -> None:
            module.unpadded = teacher.unpadded = unpadded
            step(teacher, module, plan, turns, device)

        ways = {
            name: functools.partial(run, name == "without", itertools.cycle(batches)) for name in ("with", "without")
        }
        times = take_turns(ways, max(args.rounds, BATCHES), device)
        tokens = sum(batch.counts.tokens for batch in batches) / BATCHES
        positions = sum(batch.counts.positions for batch in batches) / BATCHES
        speeds = [f"{1000 * tokens / times[name].ms:,.0f}" for name in ways]
        print(
            f"| {tokens / positions:.2f} | {' | '.join(speeds)} | {times['without'].ratio_to(times['with'])} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
