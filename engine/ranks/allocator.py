"""What a CPU's memory goes to beside tensors in use: what glibc's malloc keeps, and what oneDNN has compiled."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import MutableMapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's malloc.h"""
MOST_COMPILED = "256"
"""Matrix products that are kept compiled: those of a dozen numbers of rows for a small teacher and student."""


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
    """Gives it back to the system, after something large was built: what building it took (weights in another layout or
    precision) is seldom of a size that is asked for again."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def bound_compiled_kernels(environ: MutableMapping[str, str]) -> None:
    """Bounds the caches of oneDNN, which compiles a matrix product anew for every shape, and of PyTorch's layer over
    it, which keeps a quarter of a MiB for each: 1024 of both by default, the second for every thread, so that a run
    grew by 1.6 GiB (docs/benchmarks.md, "Memory of a long run"). Call it before torch is imported; what the user has
    set stays."""
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", MOST_COMPILED)
    environ.setdefault("LRU_CACHE_CAPACITY", MOST_COMPILED)
