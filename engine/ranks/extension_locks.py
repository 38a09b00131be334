"""Takes over locks of compiled C++ extensions whose builder is gone.

PyTorch guards the build of an extension (DeepSpeed compiles its CPU operators at their first use) with a file `lock`
that its holder creates and removes. A holder that is killed leaves it, and then whoever waits for it, and every later
start, waits without an end and without a word: torch/utils/file_baton.py of PyTorch 2.13 has neither an owner nor a
time limit.
A holder keeps the file open, though, which /proc shows; where it is in another container, only the kernel's answer to
who asks for a lease of the file does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.file_baton import FileBaton

CHECK = ".stale_lock_check"
"""Held by the rank that looks at a folder's lock."""
FRESH = ".lock_of_the_next_builder"
LOOK_S = 2.0
"""How often one who waits for a lock looks whether it is stale."""
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse", "afs", "9p")
QUIET_S = 900.0
"""Where a holder may be on another host: a build that has written nothing for so long is no build any more. The slowest
of DeepSpeed's source files takes two minutes here."""


def take_over_stale() -> None:
    """From now on, whoever finds a lock in this process waits in PyTorch's `try_acquire` until it is gone, or stale and
    therefore its own.

    A lock is stale when no process of this machine has it open; on a network file system, only after nothing in its
    folder has changed for `QUIET_S` seconds. Locks of other users are left alone.
    """
    if sys.platform.startswith("linux"):
        FileBaton.try_acquire = _acquire  # type: ignore[method-assign]


def _acquire(self: FileBaton) -> bool:
    """In place of `FileBaton.try_acquire`: False once somebody else has built the extension."""
    lock = Path(self.lock_file_path)
    try:
        self.fd = os.open(lock, os.O_CREAT | os.O_EXCL)
        return True
    except FileExistsError:
        pass
    next_look = time.monotonic()
    while lock.exists():
        if time.monotonic() >= next_look:
            self.fd = _taken_over(lock)
            if self.fd is not None:
                print(f"took over {lock}: whoever built this extension is gone; building it", flush=True)
                return True
            next_look = time.monotonic() + LOOK_S
        time.sleep(self.wait_seconds)
    return False


def _taken_over(lock: Path) -> int | None:
    """Descriptor of this process's lock in the place of a stale one; None for one that is not stale."""
    try:
        # Of two ranks that find it stale, the slower one must not replace the lock that the faster one has just taken.
        with _alone_in(lock.parent):
            if lock.stat().st_uid != os.getuid() or lock.resolve() in _open_files() or _lease_is_refused(lock):
                return None
            if _on_network(lock) and time.time() - _last_change(lock.parent) < QUIET_S:
                return None
            descriptor = os.open(lock.parent / FRESH, os.O_CREAT, 0o600)
            # not removed and made again: those who wait for it would find it gone, and the extension not built
            os.rename(lock.parent / FRESH, lock)
    except OSError:  # gone meanwhile, or not ours to replace: what follows will say
        return None
    return descriptor


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    # a file, because NFS has no exclusive flock of a folder
    descriptor = os.open(folder / CHECK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_files() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            descriptors = list(process.iterdir())
        except OSError:  # ended, or another user's
            continue
        for descriptor in descriptors:
            try:
                yield Path(os.readlink(descriptor))
            except OSError:
                continue


def _lease_is_refused(path: Path) -> bool:
    """Whether anyone on this machine has the file open, be it in another container, whose processes /proc hides.
    False, too, where the file system knows no leases."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored; the usual SIGIO would end us
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)  # which gives the lease back
    return False


def _last_change(folder: Path) -> float:
    return max(entry.stat().st_mtime for entry in folder.iterdir() if entry.name != CHECK)


def _on_network(path: Path) -> bool:
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    nearest = next((mounts[folder] for folder in path.resolve().parents if folder in mounts), "")
    return nearest.startswith(NETWORK_FILE_SYSTEMS)
