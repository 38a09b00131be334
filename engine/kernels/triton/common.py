"""What the Triton kernels share. Importing it needs Triton, which comes with CUDA builds of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.inputs import Attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on CPU tensors, slowly, for tests."""

FUSED = {"enable_fp_fusion": True}
"""Option of every launch: multiply and add in one rounding. Named because its default changes with Triton 3.10, and the
last bits with it."""
STAGES = 2
"""Pipeline stages of the kernels that loop over blocks; tests/kernels/compile_kernels.py compiles them with that
many."""


def padded_width(width: int) -> int:
    """Returns the width of a block that holds `width` columns: matrix products take powers of two from 16."""
    return max(16, int(triton.next_power_of_2(width)))


def precision(dtype: torch.dtype) -> str:
    """Returns the precision of products of such matrices: three TF32 products make a float32 one (2e-7) on tensor
    cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


class Layout(NamedTuple):
    """Where the sequences of a launch lie in tensors (B, H, L, d), or (1, H, T, d) of packed ones."""

    starts: torch.Tensor
    """First token of each sequence, (S,) int32"""
    lengths: torch.Tensor
    """Tokens of each sequence, (S,) int32"""
    longest: int
    mask: torch.Tensor | None
    """Real tokens of padded sequences, (B, L) bool"""
    packed: bool

    @classmethod
    def from_inputs(cls, inputs: Attention) -> Layout:
        (sequences, _, length, _), device = inputs.q_s.shape, inputs.q_s.device
        mask, segments = inputs.rows
        if segments is not None:
            return cls(segments.starts_on(device), segments.lengths_on(device), segments.longest, mask, True)
        starts = torch.zeros(sequences, dtype=torch.int32, device=device)
        return cls(starts, torch.full((sequences,), length, dtype=torch.int32, device=device), length, mask, False)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns STARTS, LENGTHS and MASK (anything where there is none)."""
        return self.starts, self.lengths, self.starts if self.mask is None else self.mask.view(torch.uint8)

    @property
    def mask_stride(self) -> int:
        return 0 if self.mask is None else self.mask.stride(0)

    def strides(self, *tensors: torch.Tensor) -> list[int]:
        """Returns each tensor's strides of sequences, heads and tokens; packed sequences lie in the only row."""
        return [n for x in tensors for n in (0 if self.packed else x.stride(0), x.stride(1), x.stride(2))]


def constants(inputs: Attention) -> dict[str, Any]:
    """Returns what all kernels of a launch are compiled for."""
    dtype = inputs.q_s.dtype
    return {
        "H": inputs.q_s.shape[1],
        "PRECISION": precision(dtype),
        "WIDEN": INTERPRETED and dtype != torch.float32,
        **FUSED,
    }


def widths(inputs: Attention) -> dict[str, int]:
    """Returns the head widths of both sides, and those of the blocks that hold them."""
    found = {"S": inputs.q_s.shape[-1], "T": inputs.q_t.shape[-1]}
    return {f"WIDTH_{side}": width for side, width in found.items()} | {
        f"BLOCK_{side}": padded_width(width) for side, width in found.items()
    }


def contiguous_rows(inputs: Attention) -> Attention:
    """Returns the same with the features of each token next to each other."""
    return inputs.with_tensors((x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:4]), inputs.rows)


def empty_gradients(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns room for gradients, in bfloat16 or float32: float16 might overflow before they are scaled."""
    return [torch.empty_like(x, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32) for x in tensors]


@triton.jit
def load_rows(P, rows, real, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Returns (len(rows), BLOCK) of a row-major matrix; 0 beyond its width and in rows that are not real, which are not
    read: what stands in padding cannot leak, be it NaN."""
    columns = tl.arange(0, BLOCK)
    return tl.load(
        P + rows[:, None].to(tl.int64) * stride + columns[None, :],
        mask=real[:, None] & (columns[None, :] < WIDTH),
        other=0.0,
    )


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Returns a b in float32. WIDEN: for the interpreter (3.9), which multiplies the bit patterns of bfloat16 as
    integers; products of 16-bit numbers are exact in float32, so this is the same arithmetic."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_to(a, b, to, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Returns to + a b, in one accumulator."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=to, input_precision=PRECISION)


@triton.jit
def in_window(rows, columns, window):
    """Returns (rows, columns) bool: whether these positions are `window` or less apart."""
    return tl.abs(rows[:, None] - columns[None, :]) <= window


@triton.jit
def blocks_of_window(first, OWN: tl.constexpr, OTHER: tl.constexpr, length, window):
    """Returns where the blocks of OTHER positions begin and end that hold the windows of OWN positions from `first`
    on."""
    start = tl.maximum(first - window, 0) // OTHER * OTHER
    return start, tl.minimum(first + OWN + window, length)
