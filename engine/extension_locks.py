"""Removes locks of compiled C++ extensions whose builder is gone.

PyTorch guards the build of an extension (DeepSpeed compiles its CPU operators at their first use) with a file `lock`
that its holder creates and removes. A holder that is killed leaves it, and then every later start waits for it without
an end and without a word: torch/utils/file_baton.py of PyTorch 2.13 has neither an owner nor a time limit.
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
from torch.utils import cpp_extension

LOCK = "lock"
CHECK = ".stale_lock_check"
"""Held by the rank that looks at a folder's lock."""
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse", "afs", "9p")
QUIET_S = 900.0
"""Where a holder may be on another host: a build that has written nothing for so long is no build any more. The slowest
of DeepSpeed's source files takes two minutes here."""


def build_root() -> Path:
    """Folder above the build folders of all extensions of this Python and PyTorch."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def remove_stale(root: Path) -> list[Path]:
    """Removes the stale locks below `root`, as deep as PyTorch puts them, and returns their paths.

    A lock is stale when no process of this machine has it open; on a network file system, only after nothing in its
    folder has changed for `QUIET_S` seconds. Locks of other users are left alone. Safe when several ranks call it at
    once.
    """
    if not sys.platform.startswith("linux"):
        return []
    found = [lock for pattern in (f"*/{LOCK}", f"*/*/{LOCK}") for lock in root.glob(pattern)]
    return [lock for lock in sorted(found) if _remove_if_stale(lock)]


def _remove_if_stale(lock: Path) -> bool:
    try:
        # Of two ranks that find it stale, the slower one must not remove the lock that the faster one has just taken.
        with _alone_in(lock.parent):
            if lock.stat().st_uid != os.getuid() or lock.resolve() in _open_files() or _lease_is_refused(lock):
                return False
            if _on_network(lock) and time.time() - _last_change(lock.parent) < QUIET_S:
                return False
            lock.unlink()
    except OSError:  # removed meanwhile, or not ours to remove: what follows will say
        return False
    return True


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
