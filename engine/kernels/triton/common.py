"""What the Triton kernels share. Importing it needs Triton, which comes with CUDA builds of PyTorch."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors then, slowly, for tests."""

FUSED = {"enable_fp_fusion": True}
"""Of every launch: multiply and add in one rounding. Named because its default changes with Triton 3.10, and the last
bits with it."""
STAGES = 2
"""Of the kernels that loop over blocks; tests/kernels/compile_kernels.py compiles them with that many."""


def padded_width(width: int) -> int:
    """Of a block that holds `width` columns: matrix products take powers of two from 16."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """Of products of such matrices: three TF32 products make a float32 one (2e-7) on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


@triton.jit
def load_rows(P, rows, real, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(len(rows), BLOCK) of a row-major matrix; 0 beyond its width and in rows that are not real, which are not read:
    what stands in padding cannot leak, be it NaN."""
    columns = tl.arange(0, BLOCK)
    return tl.load(
        P + rows[:, None].to(tl.int64) * stride + columns[None, :],
        mask=real[:, None] & (columns[None, :] < WIDTH),
        other=0.0,
    )


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b in float32. WIDEN: for the interpreter (3.9), which multiplies the bit patterns of bfloat16 as integers;
    products of 16-bit numbers are exact in float32, so this is the same arithmetic."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_to(a, b, to, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """to + a b, in one accumulator."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=to, input_precision=PRECISION)


@triton.jit
def in_window(rows, columns, window):
    """(rows, columns) bool: whether these positions are `window` or less apart."""
    return tl.abs(rows[:, None] - columns[None, :]) <= window


@triton.jit
def blocks_of_window(first, OWN: tl.constexpr, OTHER: tl.constexpr, length, window):
    """Where the blocks of OTHER positions begin and end that hold the windows of OWN positions from `first` on."""
    start = tl.maximum(first - window, 0) // OTHER * OTHER
    return start, tl.minimum(first + OWN + window, length)
