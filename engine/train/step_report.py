"""What is reported of the steps since the last report, and where their time went."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.data.batch import Counts


@dataclass(frozen=True)
class Interval:
    """What is known of a log interval before a model reports it."""

    step: int
    """Its last step."""
    counts: Counts
    """Of the whole interval, over all ranks."""
    phases: dict[str, float]
    """Seconds by phase on this rank."""
    wait_s: float
    """Seconds that this rank has waited for data since the start."""


@dataclass(frozen=True)
class StepReport:
    """Means over a log interval."""

    interval: Interval
    total: float
    terms: dict[str, float]
    """Raw value of each term."""
    observed: dict[str, float]
    """The same of what the losses report beside their terms."""
    coefficients: dict[str, float]
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    skipped_steps: int

    @property
    def step(self) -> int:
        return self.interval.step

    @property
    def rho(self) -> dict[str, float]:
        """|A_s - A_t| / |A_t| of the attention scores of each pair of layers (root mean squares): how far the student
        still is, and how many digits of the loss can be trusted (docs/losses.md)."""
        pairs = (name.partition("/")[2] for name in self.observed if name.startswith("attention_target/"))
        squares = {pair: (self.terms[f"attention/{pair}"], self.observed[f"attention_target/{pair}"]) for pair in pairs}
        return {pair: math.sqrt(max(d, 0.0) / t) for pair, (d, t) in squares.items() if t > 0}

    def by_loss(self) -> dict[str, float]:
        """Weighted contribution of each loss to the total: hidden, attention, embedding …"""
        sums: dict[str, float] = defaultdict(float)
        for name, value in self.terms.items():
            sums[name.partition("/")[0]] += self.coefficients[name] * value
        return dict(sums)


_Phase = tuple[str, object]
"""Name and owner."""


@dataclass(frozen=True)
class PhaseTimes:
    """Times of a log interval on this rank."""

    seconds: dict[_Phase, float]

    def of(self, model: object) -> dict[str, float]:
        """Returns the seconds by phase that one model has taken, or all in common."""
        return {name: value for (name, owner), value in self.seconds.items() if owner is None or owner is model}


class PhaseTimer:
    """Sums the time of phases over a log interval, by name and by whom they are for. On a GPU, events are recorded and
    read only in `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[_Phase, float] = defaultdict(float)
        self._events: list[tuple[_Phase, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, owner: object = None) -> Iterator[None]:
        """Times what is inside. owner: the model that it is for; None: all."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds[name, owner] += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append(((name, owner), begin, end))

    def read(self) -> PhaseTimes:
        """Returns the times since the last call. Waits for the device: call it on log steps only."""
        if self._events:
            torch.cuda.synchronize()
            for phase, begin, end in self._events:
                self._seconds[phase] += begin.elapsed_time(end) / 1000.0
            self._events.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return PhaseTimes(seconds)
