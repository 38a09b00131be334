"""How a driver is told to stop."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from engine.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED
from ga.jobs import JobPool


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for an orderly end; a second one kills the jobs."""

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
        if self._first is not None:
            self._pool.kill()
            return
        self._first = number
        if self._pool.running:
            print("stopping: jobs are told to end; once more to kill them", file=sys.stderr, flush=True)

    @property
    def requested(self) -> bool:
        return self._first is not None

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self._first == signal.SIGINT else EXIT_PREEMPTED
