"""Which projection, which scale: proxies of a few mappings under every combination, scored on tasks.

    taskset -c 0 python benchmarks/objective.py --task_dir data/glue --out benchmarks/landscapes/objective.csv
    python benchmarks/objective.py --out benchmarks/landscapes/objective.csv --report

One proxy job for each combination and seed, one after the other, each with one thread; what the file already holds is
not run again, so the campaign can be stopped and continued. The student is MiniLM's (6 x 384) three layers, copied from
layers 2, 4 and 6. `none` and the untrained start are scored with each."""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from engine.records.records import read_records
from engine.records.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PROJECTIONS = {
    "random": ("--loss.projection=shared", "--loss.projection_init=random"),
    "fitted": ("--loss.projection=shared", "--loss.projection_init=fitted"),
    "identity": ("--loss.projection=identity",),
}
GENOMES = ("2-4-6", "4-5-6", "1-2-3", "1-0-6", "0-0-0")
TASKS = ("SST-2", "MRPC", "STS-B")
FIELDS = ("projection", "scale", "lr", "steps", "seed", "genome", *TASKS, "seconds")
Row = dict[str, str]


def cells(args: argparse.Namespace) -> list[Row]:
    """The short ones first."""
    found = itertools.product(args.steps, args.seeds, args.scale, args.projection, args.lr)
    return [
        {"projection": projection, "scale": scale, "lr": lr, "steps": steps, "seed": seed}
        for steps, seed, scale, projection, lr in found
    ]


def run(cell: Row, task_dir: str) -> list[Row]:
    """One proxy job; a row for each genome."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "launch/proxy.py", "--config", "examples/proxy.yaml", "--output_dir", folder]
        words += ["--task.data_dir", task_dir, "--proxy.steps", cell["steps"], "--train.lr", cell["lr"]]
        words += ["--seed", cell["seed"], "--loss.scale", cell["scale"], *PROJECTIONS[cell["projection"]]]
        words += ["--genomes", *GENOMES]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        began = time.monotonic()
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
        results = [record for record in read_records(RunDir(Path(folder)).records) if record["kind"] == "result"]
        return [
            {
                **cell,
                "genome": one["genome"],
                **{task: f"{one['scores'][task]:.6f}" for task in TASKS},
                "seconds": f"{time.monotonic() - began:.0f}",
            }
            for one in results
        ]


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[Row]) -> None:
    new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def report(rows: list[Row]) -> None:
    """Means over mappings and seeds, and how far mappings and seeds lie apart."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["steps"], row["lr"], row["scale"], row["projection"]].append(row)
    print(
        "| steps | lr | scale | projection | "
        + " | ".join(TASKS)
        + " | none: "
        + " | ".join(TASKS)
        + " | best mapping |"
    )
    print("| --- " * (5 + 2 * len(TASKS)) + "|")
    for key in sorted(groups, key=lambda k: (int(k[0]), k[1:])):
        by: dict[str, list[Row]] = defaultdict(list)
        for row in groups[key]:
            by[row["genome"]].append(row)
        trained = [row for genome, group in by.items() if genome != "0-0-0" for row in group]
        means = [fmean(float(row[task]) for row in trained) for task in TASKS]
        none = [fmean(float(row[task]) for row in by["0-0-0"]) for task in TASKS] if "0-0-0" in by else []
        best = max(by, key=lambda g: fmean(float(row[task]) for row in by[g] for task in TASKS))
        cells_ = [f"{value:.4f}" for value in (*means, *none)]
        print("| " + " | ".join((*key, *cells_, best)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task_dir", default="data/glue")
    parser.add_argument("--projection", nargs="+", default=list(PROJECTIONS), choices=list(PROJECTIONS))
    parser.add_argument("--scale", nargs="+", default=["none", "teacher"])
    parser.add_argument("--lr", nargs="+", default=["1e-3", "3e-4"])
    parser.add_argument("--steps", nargs="+", default=["60", "240"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        report(read(args.out))
        return
    held = {tuple(row[name] for name in FIELDS[:5]) for row in read(args.out)}
    for cell in cells(args):
        if tuple(cell[name] for name in FIELDS[:5]) in held:
            continue
        append(args.out, run(cell, args.task_dir))
        print(" ".join(cell.values()), flush=True)


if __name__ == "__main__":
    main()
