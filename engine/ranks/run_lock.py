"""One start at a time in a run directory: `run.lock` says who writes there, and a second start refuses.

Two things keep it: a lock of the operating system (flock), which dies with its holder, and a sign of life that the
holder writes into the file every few seconds, for file systems where a flock is not seen by other hosts (or does not
exist). No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError
from engine.ranks import watchdog
from engine.ranks.guard import GRACE_S
from engine.records.flock import Flock, try_flock
from engine.records.processes import boot_id, start_ticks

FILE = "run.lock"
BEAT_S = 3.0
"""Seconds between two signs of life."""
QUIET_S = 10 * BEAT_S
"""Seconds without one after which a holder is gone, where no flock says so."""
LOOKS = 30
"""Number of looks for a sign of life in that time."""
ENDS_WITHIN_S = GRACE_S + 10.0
"""Seconds within which a holder whose launcher is gone is ended by its guard (engine/ranks/guard.py)."""


class RunLock:
    """Lock of a run directory, held from `acquire` until `release` or the end of the process."""

    def __init__(self, file: IO[bytes], taken_from: str | None) -> None:
        self.taken_from = taken_from
        """Holder that left a stale lock here; None when the last holder released it."""
        self._file = file
        self._beats = 0
        self._released = threading.Event()
        self._holder = {
            "host": platform.node(),
            "pid": os.getpid(),
            "machine": boot_id(),
            "launchers": [(launcher.pid, start_ticks(launcher.pid)) for launcher in watchdog.launchers()],
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._write()
        self._thread = threading.Thread(target=self._keep_alive, name="run-lock", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        line = json.dumps({**self._holder, "beats": self._beats}).encode() + b"\n"
        with contextlib.suppress(OSError):  # a disk that is full or gone: the flock still holds
            os.pwrite(self._file.fileno(), line, 0)  # never shorter than before: the number of beats only grows
            if self._beats == 0:
                os.ftruncate(self._file.fileno(), len(line))
            os.fdatasync(self._file.fileno())  # a client of NFS would keep it to itself for half a minute

    def _keep_alive(self) -> None:
        while not self._released.wait(BEAT_S):
            self._beats += 1
            self._write()

    def release(self) -> None:
        """Lets the next start in."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)
        self._file.close()


@contextlib.contextmanager
def hold(folder: Path, *, writes: bool) -> Iterator[RunLock | None]:
    """Holds the lock until the end of the block, and gives it; gives None for a process that does not write there."""
    lock = acquire(folder) if writes else None
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def acquire(folder: Path) -> RunLock:
    """Takes the lock of a run directory, which is made if need be. Waits up to QUIET_S where the last holder was on
    another machine and did not release it. Raises UserError when another start holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # not in append mode, in which Linux ignores the position of a pwrite
        file = os.fdopen(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"output_dir={str(folder)!r} cannot be written: {error}; make room or get the permission there, or name "
            "another folder"
        ) from None
    try:
        return _take(folder, file)
    except BaseException:
        file.close()
        raise


def _take(folder: Path, file: IO[bytes]) -> RunLock:
    has_flock = _flock(folder, file)
    holder = _read(folder)
    if holder is None:
        return RunLock(file, None)
    if not (has_flock and holder.get("machine") == boot_id()) and _is_alive(folder, holder):
        raise _refusal(folder, holder)  # else the flock has proved that it is gone, or its silence
    return RunLock(file, f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}")


def _flock(folder: Path, file: IO[bytes]) -> bool:
    """Returns False on a file system without flock. Raises UserError when another process holds it; waits for one that
    is being ended, because its launcher is gone."""
    until = time.monotonic() + ENDS_WITHIN_S
    while True:
        lock = try_flock(file)
        if lock is not Flock.HELD:
            return lock is Flock.TAKEN
        holder = _read(folder)
        if time.monotonic() > until or not _is_ending(holder):
            raise _refusal(folder, holder)
        time.sleep(0.2)


def _is_ending(holder: dict[str, Any] | None) -> bool:
    if holder is None or holder.get("machine") != boot_id():
        return False
    return any(start_ticks(pid) != since for pid, since in holder.get("launchers", ()))


def _read(folder: Path) -> dict[str, Any] | None:
    """Returns who holds the lock, as its file says; None when it is free. Opened anew each time: network file systems
    look for changes then."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = "?"
    if not text.strip("\0 \n"):
        return None
    try:
        holder = json.loads(text.splitlines()[0])
    except json.JSONDecodeError:
        holder = None
    return holder if isinstance(holder, dict) else {"host": "an unknown host"}


def _is_alive(folder: Path, before: dict[str, Any]) -> bool:
    """Returns whether the holder writes anything. Looks many times, and not for some time: a file system that stands
    still shows nothing new for long."""
    for _ in range(LOOKS):
        time.sleep(QUIET_S / LOOKS)
        if _read(folder) != before:
            return True
    return False


def _refusal(folder: Path, holder: dict[str, Any] | None) -> UserError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
    return UserError(
        f"output_dir={str(folder)!r}: {who} is writing there; wait until it has ended, stop it, or "
        "name another output_dir"
    )
