"""The quick start under settings of its environment, alone and beside processes that keep cores busy.

    python benchmarks/surroundings.py --busy 0 1 --settings GOMP_SPINCOUNT=300000 GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=1
    python benchmarks/surroundings.py --steps 2000 --rounds 1 --settings ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 ""

Each setting (variables of the environment, separated by commas; "" is what a start does by itself) is a run of its own
through the deepspeed launcher; within a round they take turns. Speed: the median of the step records without the first
quarter, median over rounds (min to max). Memory: peak resident memory of the rank at a quarter, half and end. What
follows `--` goes to launch/distill.py."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from measuring import device_here, header, machine

from engine.records.records import read_records
from engine.records.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keeps so many cores busy with one process each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(setting: str, steps: int, more: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the step records of one run of the quick start."""
    variables = dict(word.split("=", 1) for word in setting.split(",") if word)
    dropped = (
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    )
    env = {key: value for key, value in os.environ.items() if key not in dropped} | variables
    with tempfile.TemporaryDirectory() as folder:
        words = [str(Path(sys.executable).parent / "deepspeed"), "launch/distill.py"]
        words += ["--config", "examples/quickstart.yaml", "--output_dir", folder]
        words += [
            "--train.steps",
            str(steps),
            "--train.warmup_steps",
            str(min(30, steps // 2)),
            "--train.log_every",
            "5",
        ]
        words += ["--train.eval_every", "0", "--train.save_every", "0", *more]
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
        return [record for record in read_records(RunDir(Path(folder)).records) if record["kind"] == "step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=[""])
    parser.add_argument("--busy", nargs="+", type=int, default=[0], help="processes that keep a core busy meanwhile")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("more", nargs="*", help="further settings of launch/distill.py, after --")
    args = parser.parse_args()
    cells = [(setting, busy) for setting in args.settings for busy in args.busy]
    speeds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    peaks: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for setting, busy in cells:
            with busy_cores(busy):
                steps = [one for one in run(setting, args.steps, args.more) if "tokens_per_s" in one]
            speeds[setting, busy].append(median(one["tokens_per_s"] for one in steps[len(steps) // 4 :]))
            peaks[setting, busy] = [steps[len(steps) * share // 4 - 1]["peak_memory_gib"] for share in (1, 2, 4)]
    print(f"{machine(device_here())}\n\n{header('setting', 'busy cores', 'tokens/s', 'peak GiB')}")
    for setting, busy in cells:
        found = speeds[setting, busy]
        memory = " ".join(f"{peak:.2f}" for peak in peaks[setting, busy])
        print(
            f"| {setting or '-'} | {busy} | {median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {memory} |"
        )


if __name__ == "__main__":
    main()
