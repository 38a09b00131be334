"""How long the fine-tunings of a task will still take."""

from __future__ import annotations

import time

from engine.records.columns import duration_text


class TaskClock:
    """Time that the fine-tunings of a task take. Their epochs have the same rows, so that one tells of the next."""

    def __init__(self, epochs: float) -> None:
        """epochs: of all that are still to be done."""
        self._began, self._done, self._epochs = time.perf_counter(), 0.0, epochs

    def add(self, epochs: float) -> None:
        """Notes a fine-tuning that is finished."""
        self._done += epochs

    def time_left(self, task: str) -> str:
        """Returns ", about 3 min 20 s left of TASK", or nothing before the first one is finished."""
        if not self._done:
            return ""
        seconds = (time.perf_counter() - self._began) / self._done * (self._epochs - self._done)
        return f", about {duration_text(seconds)} left of {task}"
