"""What the campaigns of this folder share: proxy jobs cell by cell, whose rows are kept in a CSV as they come.

A campaign can be stopped at any time; started again, it goes on with the cells that its file does not hold. Two
processes share one with `--shard 0/2` and `--shard 1/2`, a file each and the same other arguments at every start; pin
each to a core (`taskset -c N`): jobs use one thread. Scores are those of the source that gave them, which the column
`code` names: run a campaign from a worktree of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student_t

from engine.errors import EXIT_DIVERGED, EXIT_DONE
from engine.records.records import read_records
from engine.records.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("SST-2", "MRPC", "STS-B")
MEASURED = ("genome", *TASKS, "core_seconds", "code")
"""The columns after those that name a cell."""
YARDSTICK = json.dumps({task: {"start": 0.0, "teacher": 1.0} for task in TASKS})
"""Raw scores: without one every job would score baselines of its own, and distil `none`."""
Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One proxy job; a row for each of its genomes."""

    columns: Mapping[str, str]
    """What names it. A `genome` among them stands in the row instead of the mapping."""
    settings: tuple[str, ...]
    """Of the proxy."""
    genomes: tuple[str, ...]
    """Layer mappings in digits, as results name them."""

    def held_in(self, rows: Sequence[Row]) -> bool:
        return any(all(row[name] == value for name, value in self.columns.items()) for row in rows)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """With what every campaign takes: `out` or `report`, `shard`, `task_dir`, `settings`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="CSV", help="run what this file does not hold yet")
    what.add_argument("--report", type=Path, nargs="+", metavar="CSV", help="print tables of these files")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th cell, from the I-th on")
    parser.add_argument("--task_dir", default="data/glue")
    parser.add_argument("settings", nargs="*", help="of the proxy, for all cells, after --")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not 0 <= int(index) < int(count):
        raise ValueError(text)
    return int(index), int(count)


def run(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """In their order: put what is cheap first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # so that the running job is ended, too
    index, count = args.shard
    missing = [cell for cell in cells[index::count] if not cell.held_in(read([args.out]))]
    for at, cell in enumerate(missing, start=1):
        print(f"{at} of {len(missing)}: {' '.join(cell.columns.values())}", flush=True)
        append(args.out, run_cell(cell, ["--task.data_dir", args.task_dir, *args.settings]))


def run_cell(cell: Cell, settings: Sequence[str]) -> list[Row]:
    """A genome that diverges has a row without scores. `core_seconds` is its share of the job's processor time, which
    other jobs on the machine change less than the time on the wall."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "launch/proxy.py", "--config", "examples/proxy.yaml", "--config", "examples/glue.yaml"]
        words += [
            "--output_dir",
            folder,
            "--proxy.yardstick",
            YARDSTICK,
            *cell.settings,
            *settings,
            "--genomes",
            *cell.genomes,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        before = processor_seconds()
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode not in (EXIT_DONE, EXIT_DIVERGED):
            sys.exit(f"{' '.join(words)}\n{done.stdout}")
        seconds = (processor_seconds() - before) / len(cell.genomes)
        records = read_records(RunDir(Path(folder)).records)
    code = next(one["fingerprint_parts"]["code"]["mapdistill"] for one in records if one["kind"] == "run")
    scores = {one["genome"]: one["scores"] for one in records if one["kind"] == "result"}
    return [
        {
            "genome": genome,
            **{task: f"{scores[genome][task]:.6f}" if genome in scores else "" for task in TASKS},
            "core_seconds": f"{seconds:.1f}",
            "code": code,
            **cell.columns,
        }
        for genome in cell.genomes
    ]


def processor_seconds() -> float:
    """Of all jobs that have ended, and what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(paths: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows += csv.DictReader(file)
    return rows


def read_scored(paths: Sequence[Path]) -> list[Row]:
    """For a report, which says what is wrong with them."""
    rows = read(paths)
    versions = sorted({row["code"] for row in rows})
    if len(versions) > 1:
        print(f"Not of one source: {', '.join(versions)}\n")
    scored = [row for row in rows if all(row[task] for task in TASKS)]
    if len(scored) < len(rows):
        print(f"{len(rows) - len(scored)} of {len(rows)} students diverged and are left out\n")
    return scored


def append(path: Path, rows: Sequence[Row]) -> None:
    names = [name for name in rows[0] if name not in MEASURED]
    new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names, *MEASURED], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t); nan for the second with fewer than two values."""
    if len(values) < 2:
        return fmean(values), float("nan")
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values), half


def as_difference(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:+.4f} ± {half:.4f}"
