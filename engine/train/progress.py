"""The progress of training on a terminal or in a log: a bar, or lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from engine.records.columns import duration_text
from engine.train.step_report import StepReport

ETA_AFTER_STEPS = 20
"""Number of first steps that allocate, compile and warm caches; the time left is estimated without them."""


FIRST_REPORTS = 3
"""Number of first reports whose highest speed is what later ones are compared with."""
SLOW = 0.5
"""Share of that speed below which two reports in a row are worth a warning."""
SLOW_REMEDY = (
    "another process may use the same cores or the same GPU (look with top or nvidia-smi): end it, or give each job "
    "cores of its own (taskset) and as many threads (OMP_NUM_THREADS)"
)


class Progress:
    """A bar on a terminal, unless lines of several models are mixed; else a line for each report."""

    def __init__(self, steps: int, name: str) -> None:
        """Shows nothing before `begin`. name: of the model, before each line; empty where there is one model."""
        self.steps = steps
        """Number of steps of the whole run."""
        self._name = name
        self._bar: tqdm[Any] | None = None
        self._start_step = 0
        self._eta_mark = (0, 0.0)
        """Step and time from which on the speed is measured."""
        self._speeds: list[float] = []
        """Tokens per second of the first reports, and of the last one."""
        self._is_slow = False

    def begin(self, step: int) -> None:
        """Starts to count, after `step`."""
        self._start_step, self._eta_mark = step, (step, time.perf_counter())
        if sys.stderr.isatty() and not self._name:
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # with one time left: ours
            self._bar = tqdm(
                total=self.steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr, bar_format=shape
            )

    def step(self, report: StepReport, tokens_per_s: float) -> None:
        """Shows where training is."""
        left = self._time_left(report.step)
        self._warn_if_slow(tokens_per_s)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {report.total:.4g}, {tokens_per_s:,.0f} tok/s{left}", refresh=False)
            self._bar.update(report.step - self._bar.n)
            return
        parts = ", ".join(f"{name} {value:.4g}" for name, value in report.by_loss().items())
        self.say(
            f"step {report.step}/{self.steps}  loss {report.total:.4g} ({parts})  lr {report.lr:.2e}  "
            f"{tokens_per_s:,.0f} tokens/s{left}"
        )

    def _warn_if_slow(self, tokens_per_s: float) -> None:
        """Prints, once, that the speed has fallen."""
        first, before = self._speeds[:FIRST_REPORTS], self._speeds[FIRST_REPORTS:]
        self._speeds = [*first, tokens_per_s]
        if self._is_slow or self._name or not before:
            return
        fastest = max(first)
        if max(*before, tokens_per_s) < SLOW * fastest:
            self._is_slow = True
            self.say(f"warning: {tokens_per_s:,.0f} tokens/s, after {fastest:,.0f} in the first steps: {SLOW_REMEDY}")

    def _time_left(self, step: int) -> str:
        now, done = time.perf_counter(), step - self._start_step
        if done >= ETA_AFTER_STEPS:
            per_step = (now - self._eta_mark[1]) / (step - self._eta_mark[0])
            return f", {duration_text(per_step * (self.steps - step))} left"
        if done <= ETA_AFTER_STEPS // 2:
            self._eta_mark = (step, now)
        return ""

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        text = f"{self._name}  {text}" if self._name else text
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def end(self) -> None:
        """Leaves the bar where it is; further lines come under it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
