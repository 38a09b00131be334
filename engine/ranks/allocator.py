"""What a CPU's memory goes to beside tensors in use: what glibc's malloc keeps, and what oneDNN has compiled."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import MutableMapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's malloc.h"""
MOST_COMPILED = "64"
"""Matrix products and the like that oneDNN keeps compiled: more than one step has, teacher and student together."""


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


def bound_compiled_kernels(environ: MutableMapping[str, str]) -> None:
    """Bounds the cache of oneDNN, which compiles a matrix product anew for every shape and keeps 1024 of them. Batches
    without pads have another number of tokens each step, so that a run grew by 1.6 GiB (docs/benchmarks.md, "Memory
    of a long run"). Call it before the first one; what the user has set stays."""
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", MOST_COMPILED)
