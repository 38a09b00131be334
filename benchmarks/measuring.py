"""What the benchmarks of this folder share: peak memory, and the words about the machine. Their times are taken by
engine/jobs/measure/turns.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.ranks.machine import device_name


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device, packages: Sequence[str] = ()) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    return f"{device_name(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


def resident_mib(field_name: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name)) / 1024


def peak_above(base_mib: float, function: Callable[[], Any], device: torch.device) -> float:
    """MiB: the highest resident memory during the call above base_mib; on a GPU the highest allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20 - base_mib
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    function()
    return resident_mib("VmHWM") - base_mib


def base_memory(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else resident_mib()


def in_a_fresh_process(*arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """What this script prints as the last line, as JSON, when it is called with these arguments."""
    words = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def header(*names: str) -> str:
    return f"| {' | '.join(names)} |\n|" + " --- |" * len(names)
