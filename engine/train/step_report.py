"""The report of a log interval: losses, where its time went, and how fast it was."""

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
    """Facts of a log interval beside the losses of a model."""

    step: int
    """Last step of the interval."""
    counts: Counts
    """Counts of its batches, over all ranks."""
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
    """Values that the losses report beside their terms."""
    coefficients: dict[str, float]
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    skipped_steps: int

    @property
    def step(self) -> int:
        """Last step of the interval"""
        return self.interval.step

    @property
    def rho(self) -> dict[str, float]:
        """|A_s - A_t| / |A_t| of the attention scores of each pair of layers (root mean squares): how far the student
        still is, and how many digits of the loss can be trusted (docs/losses.md)."""
        pairs = (name.partition("/")[2] for name in self.observed if name.startswith("attention_target/"))
        squares = {pair: (self.terms[f"attention/{pair}"], self.observed[f"attention_target/{pair}"]) for pair in pairs}
        return {pair: math.sqrt(max(d, 0.0) / t) for pair, (d, t) in squares.items() if t > 0}

    def by_loss(self) -> dict[str, float]:
        """Returns the weighted contribution of each loss to the total: hidden, attention, embedding …"""
        sums: dict[str, float] = defaultdict(float)
        for name, value in self.terms.items():
            sums[name.partition("/")[0]] += self.coefficients[name] * value
        return dict(sums)


_Phase = tuple[str, object]
"""Name and owner."""


@dataclass(frozen=True)
class Measures:
    """Counts and times of a log interval."""

    counts: Counts
    """Counts of its batches, over all ranks."""
    seconds: dict[_Phase, float]
    """Seconds by phase on this rank."""

    def phases_of(self, model: object) -> dict[str, float]:
        """Returns the seconds by phase that one model has taken, or all in common."""
        return {name: value for (name, owner), value in self.seconds.items() if owner is None or owner is model}


class IntervalMeter:
    """Sums over a log interval the counts of its batches, and the time of phases by name and by whom they are for. On a
    GPU, events are recorded and read only in `read`."""

    def __init__(self, device: torch.device) -> None:
        self._counts = Counts()
        self._cuda = device.type == "cuda"
        self._seconds: dict[_Phase, float] = defaultdict(float)
        self._events: list[tuple[_Phase, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, counts: Counts) -> None:
        """Adds the counts of a step over all ranks."""
        self._counts = self._counts + counts

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

    def read(self) -> Measures:
        """Returns what was measured since the last call. Waits for the device: call it on log steps only."""
        if self._events:
            torch.cuda.synchronize()
            for phase, begin, end in self._events:
                self._seconds[phase] += begin.elapsed_time(end) / 1000.0
            self._events.clear()
        measures = Measures(self._counts, dict(self._seconds))
        self._counts, self._seconds = Counts(), defaultdict(float)
        return measures


class Speedometer:
    """The speed of training between two reports of a model, pauses left out."""

    def __init__(self, flops_per_token: float) -> None:
        self._flops_per_token = flops_per_token
        self._mark = 0.0
        """time.perf_counter() of the last report, later by the pauses since then."""
        self._wait_s = 0.0
        """Seconds that this rank had waited for data at the last report."""

    def begin(self) -> None:
        """Starts the clock."""
        self._mark = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out the time that is spent inside."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def read(self, interval: Interval) -> tuple[float, dict[str, float]]:
        """Returns the seconds since the last call, and the speeds in them by the names of a record."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        wait, self._wait_s = interval.wait_s - self._wait_s, interval.wait_s
        counts = interval.counts
        return seconds, {
            "tokens_per_s": counts.tokens / seconds,
            "samples_per_s": counts.sequences / seconds,
            "tflops": self._flops_per_token * counts.tokens / seconds / 1e12,
            "data_wait_share": wait / seconds,
            "fill": counts.tokens / max(counts.positions, 1.0),
        }
