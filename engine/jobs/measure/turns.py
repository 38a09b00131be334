"""Times of functions that are called in turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from engine.records.comparison import Speedup

WARM_UP = 2
"""Rounds that are not counted."""
LEAST_ROUNDS = 3
"""Rounds that are counted however long they take."""


@dataclass
class Times:
    """Seconds that a function took, a value for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of all threads of the process."""

    @property
    def ms(self) -> float:
        """Median of the rounds in milliseconds"""
        return 1000 * median(self.wall)

    def speedup_over(self, other: Times) -> Speedup:
        """Returns how many times as fast as the other it was in the same round: median, least and most."""
        ratios = [theirs / ours for theirs, ours in zip(other.wall, self.wall, strict=True)]
        return median(ratios), min(ratios), max(ratios)

    def ratio_to(self, other: Times) -> str:
        """Returns the same as text."""
        mid, low, high = self.speedup_over(other)
        return f"{mid:.2f} ({low:.2f} to {high:.2f})"


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, limit_s: float = math.inf
) -> dict[str, Times]:
    """Calls A B C … A B C …, `rounds` times after the warm-up, and returns the times of each. Ends earlier, with at
    least LEAST_ROUNDS, where all of it has taken limit_s seconds."""
    times = {name: Times() for name in functions}
    start = time.perf_counter()
    for turn in range(rounds + WARM_UP):
        if turn >= WARM_UP + LEAST_ROUNDS and time.perf_counter() - start > limit_s:
            break
        for name, function in functions.items():
            synchronise(device)
            began, began_cpu = time.perf_counter(), time.process_time()
            function()
            synchronise(device)
            if turn >= WARM_UP:
                times[name].wall.append(time.perf_counter() - began)
                times[name].cpu.append(time.process_time() - began_cpu)
    return times
