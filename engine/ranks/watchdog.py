"""Ends a rank that hangs: a lost network, a stopped or stuck rank elsewhere. Without it a collective waits for half an
hour, or for ever.

The loop calls `beat` whenever something was finished. When nothing was for `limit_s` seconds, a thread writes the
stacks of all threads to a file and to stderr, and ends the process. Where that thread does not get to run (the process
is stopped, or something holds Python's lock), the guard process acts (engine/ranks/guard.py). Every rank has both, so
that each leaves its stacks, and no host keeps ranks that wait for others."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import math
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

from engine.errors import EXIT_CRASH
from engine.ranks import guard
from engine.records import stdout

LAUNCHERS = ("deepspeed", "torchrun")
LAUNCHER_MODULES = (
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
)

_STDERR = 2
"""sys.stderr may be a notebook's, which has no number."""

_heartbeat: mmap.mmap | None = None
_guard: subprocess.Popen[bytes] | None = None
_limit_s = 0.0


@functools.cache
def launchers() -> tuple[psutil.Process, ...]:
    """Returns the launchers above this process when it was asked first, nearest first; none for a rank that a user,
    srun or mpirun started."""
    processes = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            is_script = any(Path(word).name in LAUNCHERS for word in words[:2])
            if is_script or any(module in words[:4] for module in LAUNCHER_MODULES):
                processes.append(parent)
    return tuple(processes)


def has_lost_launcher() -> bool:
    """Returns whether DeepSpeed's launcher, or its part on this host, was gone before this process could see it: nobody
    would end the rank, or wait for it. For the start of a rank."""
    if not any(word.startswith("--local_rank=") for word in sys.argv):
        return False
    try:
        top = launchers()[-1] if launchers() else psutil.Process()
        return (not launchers() or "deepspeed.launcher.launch" in top.cmdline()) and _is_adopted(top)
    except psutil.Error:
        return True  # it has ended just now


def _is_adopted(process: psutil.Process) -> bool:
    """Returns whether it has lost the parent that started it in its own process group and session: who adopts it is
    process 1, or of another session."""
    parent = process.ppid()
    with contextlib.suppress(ProcessLookupError):
        is_leader = os.getpgid(process.pid) == process.pid  # started apart: by sshd, an init of a container, a user
        return not is_leader and (parent == 1 or os.getsid(parent) != os.getsid(process.pid))
    return True


def start_guard() -> None:
    """Starts the guard process of this rank (Linux only), which ends with it. As early as possible: it can only watch
    over launchers that are still there."""
    global _heartbeat, _guard
    if _heartbeat is not None:
        return
    stdout.survive_lost_readers()
    faulthandler.enable(_STDERR)  # for the guard's SIGABRT, and for crashes in native code
    with tempfile.TemporaryFile() as file:
        file.truncate(guard.SHARED_BYTES)
        _heartbeat = mmap.mmap(file.fileno(), guard.SHARED_BYTES)
        if not sys.platform.startswith("linux"):
            return
        pids = ",".join(str(launcher.pid) for launcher in launchers())
        _guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), pids, str(file.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[file.fileno()],
        )


def stop_guard() -> None:
    """Ends the guard process, where there is one: the rank's work is done, and its process goes on with other
    things."""
    global _heartbeat, _guard
    if _guard is not None:
        _guard.kill()  # it ignores what is meant for its rank
        _guard.wait()
    _heartbeat = _guard = None


def beat() -> None:
    """Notes that something was finished. Costs less than a microsecond; does nothing outside of `watch`."""
    if _heartbeat is not None:
        guard.HEARTBEAT.pack_into(_heartbeat, 0, time.monotonic(), _limit_s)


def rest() -> None:
    """Expects no sign of life until the next `beat`: what comes may take any time."""
    if _heartbeat is not None:
        guard.HEARTBEAT.pack_into(_heartbeat, 0, math.inf, _limit_s)


@contextmanager
def watch(limit_s: float, dump: Path, report: Callable[[], None]) -> Iterator[None]:
    """Ends a rank that, inside of the block, does not `beat` for `limit_s` seconds (0: no limit), with code 1.

    dump: the file for the stacks. report: called on this rank before its end, after them; may fail.
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
    def __init__(self, limit_s: float, dump: Path, report: Callable[[], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._limit_s, self._dump, self._report = limit_s, dump, report
        self._stopped = threading.Event()
        self._last_pause = 0.0
        """Guard's last look before the last pause"""

    def stop(self) -> None:
        """Ends the thread, and waits for that."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while True:
            assert _heartbeat is not None
            if self._was_paused(_heartbeat):
                beat()
            last, _ = guard.HEARTBEAT.unpack_from(_heartbeat)
            left = last + self._limit_s - time.monotonic()
            if left <= 0:
                self._end()
            if self._stopped.wait(min(left, self._limit_s / 4)):
                return

    def _was_paused(self, shared: mmap.mmap) -> bool:
        """Returns whether the guard, too, has not run for a while, and this was not said of the same while before (a
        guard that is gone never looks again)."""
        (looked,) = guard.LOOK.unpack_from(shared, guard.HEARTBEAT.size)
        if not looked or looked == self._last_pause or time.monotonic() - looked < guard.PAUSED_S:
            return False
        self._last_pause = looked
        return True

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._dump.parent.mkdir(parents=True, exist_ok=True)
            with self._dump.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        with contextlib.suppress(Exception):
            self._report()
        os._exit(EXIT_CRASH)
