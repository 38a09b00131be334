"""Everything that only a GPU can show, in one run of at most 8 minutes; the figures go to a file.

    make gpu-check                     # or: python benchmarks/gpu_check.py --to gpu_check.txt

Tests marked `gpu`, the quick start, a search of two jobs, benchmarks/step.py and benchmarks/kernels.py, in this order;
each has a limit, and what is over it is ended and said. Without a CUDA device it prints what it would run."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import device_here, machine

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0

PARTS = {
    "gpu-marked tests": ("python -m pytest -q -m gpu tests", 120),
    "quick start": ("deepspeed launch/distill.py --config examples/quickstart.yaml --output_dir OUT/quickstart", 90),
    "search of two jobs": (
        "python launch/search.py --config examples/search.yaml --search.trials 2 --search.cohort 1 "
        "--search.confirm_top 0 --output_dir OUT/search",
        120,
    ),
    "a step": ("python benchmarks/step.py --rounds 5", 90),
    "loss kernels": ("python benchmarks/kernels.py --lengths 128 512 --rounds 5", 120),
}
"""Name -> command and its limit in seconds."""


def run(command: list[str], limit_s: float) -> tuple[str, str]:
    """Returns how it ended, and its output; a command that is over its limit is ended with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return f"exit code {process.returncode}", output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"ended at its limit of {limit_s:.0f} s", process.communicate()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("gpu_check.txt"), help="file for the figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here; with one this would run, within 8 minutes:")
        print("\n".join(f"  {name}: {command} ({limit} s at most)" for name, (command, limit) in PARTS.items()))
        return 0
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, args.to.open("w", encoding="utf-8") as file:
        packages = ("deepspeed", "transformers", "triton")
        print(machine(device_here(), packages), file=file, flush=True)
        for name, (command, limit) in PARTS.items():
            words = shlex.split(command.replace("OUT", folder).replace("python ", f"{shlex.quote(sys.executable)} ", 1))
            at = time.monotonic()
            ended, output = run(words, min(limit, SECONDS - (at - began)))
            line = f"{name}: {ended}, {time.monotonic() - at:.0f} s"
            failed += ended != "exit code 0"
            print(line, flush=True)
            print(f"\n## {line}\n{shlex.join(words)}\n\n{output}", file=file, flush=True)
    print(f"figures: {args.to}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
