"""Threads of a rank on a CPU, on a machine that it may have to share. No torch here: OpenMP reads its settings when
torch is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping

import psutil

SPIN_COUNT = "1000"
LOOK_S = 0.25


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Lets OpenMP's threads sleep at a barrier after a short while. By default they spin for some 20 ms, since on a
    quiet machine the others are there at once; where another process has one of the cores, the thread that is waited
    for does not run meanwhile, and every barrier takes as long (docs/benchmarks.md, "A busy machine"). Call it
    before torch is imported; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def seconds_of_others(ranks_here: int) -> dict[int, float]:
    """Returns the CPU seconds that processes of other jobs have had, by pid; ranks that the same launcher has started
    beside this one are left out."""
    parent = os.getppid() if ranks_here > 1 else None
    return {
        process.pid: sum(process.info["cpu_times"][:2])
        for process in psutil.process_iter(["ppid", "cpu_times"])
        if process.pid != os.getpid() and process.info["cpu_times"] and process.info["ppid"] != parent
    }


def cores_of_others(ranks_here: int) -> float:
    """Returns how many of the cores that this process may use are kept busy by other jobs, over LOOK_S seconds."""
    before, began = seconds_of_others(ranks_here), time.monotonic()
    time.sleep(LOOK_S)
    spent = 0.0
    for process in psutil.process_iter(["cpu_times"]):
        if process.pid in before and process.info["cpu_times"]:
            spent += sum(process.info["cpu_times"][:2]) - before[process.pid]
    return min(spent / (time.monotonic() - began), float(len(os.sched_getaffinity(0))))
