"""The lock that the operating system keeps on an open file: it dies with its holder."""

from __future__ import annotations

import contextlib
import fcntl
from enum import Enum
from pathlib import Path
from typing import IO


class Flock(Enum):
    TAKEN = "taken"
    HELD = "held by another process"
    MISSING = "not known to this file system"
    """No locks at all, as on Lustre, or NFS without its lock service."""


def try_flock(file: IO[bytes] | IO[str] | int) -> Flock:
    """Tries to take the lock of an open file, without waiting. Closing the file frees it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Flock.HELD
    except OSError:
        return Flock.MISSING
    return Flock.TAKEN


def free(file: int) -> None:
    """Frees a lock also where a child that was forked meanwhile has the file open."""
    with contextlib.suppress(OSError):  # of a file system without locks
        fcntl.flock(file, fcntl.LOCK_UN)


def no_locks_text(folder: Path, consequence: str) -> str:
    """Returns the line that is said where a file system has no such locks and a job goes on without."""
    return f"{folder}: no file locks there, so {consequence}"
