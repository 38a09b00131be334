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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from engine.errors import EXIT_DIVERGED, EXIT_DONE
from engine.records.fingerprints import digest
from engine.records.records import read_records
from engine.records.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("SST-2", "MRPC", "STS-B")
RAW = {"start": 0.0, "teacher": 1.0}
"""Yardstick of raw scores: without one every job would score baselines of its own, and distil `none`."""
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
    tasks: tuple[str, ...] = TASKS
    folder: Path | None = None
    """Run directory that is kept, so that the job of a later cell goes on from its checkpoints; None: a new one."""

    def held_in(self, rows: Sequence[Row]) -> bool:
        return any(all(row[name] == value for name, value in self.columns.items()) for row in rows)


RowsOf = Callable[[Cell, Sequence[str]], list[Row]]
"""What a cell starts with the settings of all cells -> its rows."""


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


def run(cells: Sequence[Cell], args: argparse.Namespace, rows_of: RowsOf | None = None) -> None:
    """In their order: put what is cheap first. rows_of: what a cell starts; unset: a proxy job."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # so that the running job is ended, too
    missing = [cell for cell in share(cells, *args.shard) if not cell.held_in(read([args.out]))]
    for at, cell in enumerate(missing, start=1):
        print(f"{at} of {len(missing)}: {' '.join(cell.columns.values())}", flush=True)
        append(args.out, (rows_of or proxy_rows)(cell, ["--task.data_dir", args.task_dir, *args.settings]))


def share(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """Returns every count-th cell; those of one folder, which is one process's alone, count as one."""
    keys = [str(cell.folder or dict(cell.columns)) for cell in cells]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [cell for cell, key in zip(cells, keys, strict=True) if places[key] % count == index]


def proxy_rows(cell: Cell, settings: Sequence[str]) -> list[Row]:
    """A genome that diverges has a row without scores. `core_seconds` is its share of the job's processor time, which
    other jobs on the machine change less than the time on the wall."""
    words = ["launch/proxy.py", "--config", "examples/proxy.yaml", "--config", "examples/glue.yaml"]
    words += ["--proxy.tasks", json.dumps(cell.tasks)]
    words += ["--proxy.yardstick", json.dumps(dict.fromkeys(cell.tasks, RAW))]
    words += [*cell.settings, *settings, "--genomes", *cell.genomes]
    records, seconds = run_job(words, cell.folder)
    parts = [one["fingerprint_parts"] for one in records if one.get("status") == "started"][-1]
    results = [one for one in records if one["kind"] == "result" and one["fingerprint"] == digest(parts)]
    scores = {one["genome"]: one["scores"] for one in results}
    names = {name: value for name, value in cell.columns.items() if name != "genome"}
    return [
        {
            **names,
            "genome": cell.columns.get("genome", genome),
            **{task: f"{scores[genome][task]:.6f}" if genome in scores else "" for task in cell.tasks},
            "core_seconds": f"{seconds / len(cell.genomes):.1f}",
            "code": parts["code"]["mapdistill"],
        }
        for genome in cell.genomes
    ]


def run_job(words: Sequence[str], folder: Path | None) -> tuple[list[dict[str, Any]], float]:
    """Starts a script, on one thread. Returns the records of its folder (None: a new one), and the processor time that
    it took, in seconds. Ends the campaign with the script's output if it fails."""
    with nullcontext(str(folder)) if folder else tempfile.TemporaryDirectory() as place:
        seconds = run_script(words, place)
        return read_records(RunDir(Path(place)).records), seconds


def run_script(words: Sequence[str], folder: str) -> float:
    """Like run_job, for a script that leaves no records."""
    all_words = [sys.executable, *words[:1], "--output_dir", folder, *words[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = processor_seconds()
    done = subprocess.run(all_words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in (EXIT_DONE, EXIT_DIVERGED):
        sys.exit(f"{' '.join(all_words)}\n{done.stdout}")
    return processor_seconds() - before


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


def read_scored(paths: Sequence[Path], tasks: Sequence[str] = TASKS) -> list[Row]:
    """For a report, which says what is wrong with them."""
    rows = read(paths)
    versions = sorted({row["code"] for row in rows})
    if len(versions) > 1:
        print(f"Not of one source: {', '.join(versions)}\n")
    scored = [row for row in rows if all(row[task] for task in tasks)]
    if len(scored) < len(rows):
        print(f"{len(rows) - len(scored)} of {len(rows)} students diverged and are left out\n")
    return scored


def append(path: Path, rows: Sequence[Row]) -> None:
    new = not path.is_file()
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        writer = csv.DictWriter(file, next(csv.reader(file), list(rows[0])), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t); nan for the second with fewer than two values."""
    if len(values) < 2:
        return fmean(values), float("nan")
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values), half


def as_mean(values: Sequence[float]) -> str:
    """Returns mean and interval; a single value has none."""
    return _as_text(values, ".4f")


def as_difference(values: Sequence[float]) -> str:
    return _as_text(values, "+.4f")


def _as_text(values: Sequence[float], form: str) -> str:
    mean, half = mean_interval(values)
    return f"{mean:{form}}" + (f" ± {half:.4f}" if len(values) > 1 else "")
