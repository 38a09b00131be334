"""Ends a rank that hangs: a lost network, a stopped or stuck rank elsewhere. Without it a collective waits for half an
hour, or for ever.

The loop calls `beat` whenever something was finished. When nothing was for `limit_s` seconds, a thread writes the
stacks of all threads to a file and to stderr, and ends the process. Where that thread does not get to run (the process
is stopped, or something holds Python's lock), the guard process acts (engine/rank_guard.py). Every rank has both, so
that each leaves its stacks, and no host keeps ranks that wait for others."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from engine import output, rank_guard
from engine.exit_codes import EXIT_CRASH

LAUNCHERS = ("deepspeed", "torchrun")
LAUNCHER_MODULES = ("deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run")

_heartbeat: mmap.mmap | None = None
_limit_s = 0.0


def launcher_pids() -> list[int]:
    """The launchers above this process, nearest first. Empty for a rank that a user, srun or mpirun started."""
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            is_script = any(Path(word).name in LAUNCHERS for word in words[:2])
            if is_script or any(module in words[:4] for module in LAUNCHER_MODULES):
                found.append(parent.pid)
    return found


def start_guard() -> None:
    """Starts the guard process of this rank (Linux only), which ends with it."""
    global _heartbeat
    if _heartbeat is not None:
        return
    output.survive_lost_readers()
    faulthandler.enable(sys.stderr.fileno())  # for the guard's SIGABRT, and for crashes in native code
    with tempfile.TemporaryFile() as file:
        file.truncate(rank_guard.HEARTBEAT.size)
        _heartbeat = mmap.mmap(file.fileno(), rank_guard.HEARTBEAT.size)
        if not sys.platform.startswith("linux"):
            return
        launchers = ",".join(map(str, launcher_pids()))
        subprocess.Popen(
            [sys.executable, "-I", "-S", rank_guard.__file__, str(os.getpid()), launchers, str(file.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[file.fileno()],
        )


def beat() -> None:
    """Something was finished. Costs less than a microsecond; does nothing unless armed."""
    if _heartbeat is not None:
        rank_guard.HEARTBEAT.pack_into(_heartbeat, 0, time.monotonic(), _limit_s)


@contextmanager
def armed(limit_s: float, dump: Path, report: Callable[[Path], None]) -> Iterator[None]:
    """While inside, a rank that does not `beat` for `limit_s` seconds (0: no limit) is ended with code 1.

    dump: the file for the stacks. report: called on this rank before its end, with that file; may fail.
    """
    global _limit_s
    if limit_s <= 0:
        yield
        return
    before, _limit_s = _limit_s, limit_s
    start_guard()
    thread = _Watch(limit_s, dump, report)
    beat()
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        _limit_s = before
        beat()


class _Watch(threading.Thread):
    def __init__(self, limit_s: float, dump: Path, report: Callable[[Path], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._limit_s, self._dump, self._report = limit_s, dump, report
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while True:
            assert _heartbeat is not None
            last, _ = rank_guard.HEARTBEAT.unpack_from(_heartbeat)
            left = last + self._limit_s - time.monotonic()
            if left <= 0:
                self._end()
            if self._stopped.wait(min(left, self._limit_s / 4)):
                return

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._dump.parent.mkdir(parents=True, exist_ok=True)
            with self._dump.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)
        with contextlib.suppress(Exception):
            self._report(self._dump)
        os._exit(EXIT_CRASH)
