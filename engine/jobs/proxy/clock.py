"""Where the time of a proxy job goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up the wall time of phases over all cohorts of a start; a second counts for one phase."""

    def __init__(self, start_s: float) -> None:
        """Begins with the seconds that the start of the process has taken."""
        self.seconds: dict[str, float] = {"start": start_s}
        """Seconds by phase."""
        self._inner_s = 0.0
        """Seconds of the phases inside the current one."""
        self._shared: dict[str, float] = {}
        self._earlier_cohorts: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is inside, without the phases inside of it."""
        start, before, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        yield
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self._inner_s
        self._inner_s = before + seconds

    def share(self) -> None:
        """Counts the time until now as what all cohorts share."""
        self._shared = dict(self.seconds)

    def begin_cohort(self) -> None:
        """Counts the time since `share` as that of earlier cohorts."""
        self._earlier_cohorts = _difference(self.seconds, self._shared)

    def of_cohort(self) -> dict[str, float]:
        """Returns the seconds of the current cohort by phase, with what all cohorts share."""
        return _difference(self.seconds, self._earlier_cohorts)


def _difference(seconds: dict[str, float], less: dict[str, float]) -> dict[str, float]:
    return {name: value - less.get(name, 0.0) for name, value in seconds.items()}
