"""glibc's malloc, which serves large tensors on a CPU; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's malloc.h"""


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> None:
    """Lets malloc serve large tensors from memory that was freed before. By default it gives each back to the system
    and gets the next one as new pages, whose faults were a quarter of a small student's optimizer step on a CPU
    (docs/benchmarks.md, "Memory allocator")."""
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the largest there is


def return_freed_memory() -> None:
    """Once, after something large was built: what building it took (weights in another layout or precision) is seldom
    of a size that is asked for again."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
