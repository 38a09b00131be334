"""What the benchmarks of this folder share: turns, peak memory, and the words about the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

WARM_UP = 2


@dataclass
class Times:
    """Of one function, in seconds, a value for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of all threads of the process."""

    @property
    def ms(self) -> float:
        return 1000 * median(self.wall)

    def ratio_to(self, other: Times) -> str:
        """How many times as fast as the other: the median of the rounds (min to max)."""
        ratios = [theirs / ours for theirs, ours in zip(other.wall, self.wall, strict=True)]
        return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, Times]:
    """A B C … A B C …, so that a busy moment of the machine hits all of them."""
    times = {name: Times() for name in functions}
    for turn in range(rounds + WARM_UP):
        for name, function in functions.items():
            synchronise(device)
            began, began_cpu = time.perf_counter(), time.process_time()
            function()
            synchronise(device)
            if turn >= WARM_UP:
                times[name].wall.append(time.perf_counter() - began)
                times[name].cpu.append(time.process_time() - began_cpu)
    return times


def machine(device: torch.device, packages: Sequence[str] = ()) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
        flags = "AMX" if "amx_bf16" in info else "no AMX"
        name = f"{model[0]} ({flags})"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


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
