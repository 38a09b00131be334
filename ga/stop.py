"""How a driver is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType

from engine.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from ga.jobs.pool import JobPool

_STDERR = 2


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for an orderly end; a second one kills the jobs, but for SIGHUP: a terminal that
    goes often sends two."""

    def __init__(self, pool: JobPool) -> None:
        self._pool = pool
        self._first: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = number
            if self._pool.running:
                with contextlib.suppress(OSError):  # it would be raised wherever the driver is just now
                    os.write(_STDERR, b"stopping: jobs are told to end; once more to kill them\n")
        elif number != signal.SIGHUP:
            self._pool.kill()

    @property
    def requested(self) -> bool:
        return self._first is not None

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self._first == signal.SIGINT else EXIT_PREEMPTED
