"""Precision of the kernels' matrix products and gradients: what their inputs have, and never less than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def widest(*tensors: torch.Tensor) -> torch.dtype:
    """Returns float64 when any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Makes float32 products be computed in float32 during the block: not in autocast's 16 bits, nor in the TF32 that a
    user may have allowed for the models (a difference of nearly equal maps would lose its digits)."""
    matmul = torch.backends.cuda.matmul
    # PyTorch before 2.9 has only the older name; later ones refuse to read it once the new one was written.
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


def scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns gradient * scale, multiplied in float32 and rounded once; scale is a scalar on the device, and a GPU is
    not asked for it. (A tensor of no dimensions times a 16-bit tensor would itself be rounded first, and every gradient
    be off by the same factor.)

    Overwrites a gradient that has the dtype already: a second backward through the same graph, which would scale it
    again, is then an error of autograd, which watches saved tensors."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, _factor(scale, gradient.dim()), out=out)


def _factor(scale: torch.Tensor, dimensions: int) -> torch.Tensor | float:
    """Returns a number on a CPU, since its product with 16 bits needs no float32 copy of them."""
    return scale.item() if scale.device.type == "cpu" else scale.reshape([1] * dimensions)


class AttentionFunction(torch.autograd.Function):
    """Base of the functions of (q_s, k_s, inputs, settings...) that know their gradients after the forward.

    The forward saves both gradients in any dtype, and sets `ctx.factor`, which they still have to be multiplied by, and
    `ctx.dtypes`, which they are to be rounded to. Only its first result is differentiable.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream * ctx.factor
        d_query, d_key = (scaled(g, scale, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return d_query, d_key, *[None] * (len(ctx.needs_input_grad) - 2)


def product_over_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a^T b of two matrices with many rows. In float32 for float16, whose range a sum of that many products can
    leave, and no loss scale would help."""
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return a.t() @ b


def square_sum(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Returns sum(x^2), summed in `kind`; x (rows, features). A dot product where it sums in that, else by rows: the
    norm of a whole 16-bit tensor is a hundred times less exact (5e-5 for 1024 x 768), and not faster."""
    if x.dtype == kind:
        flat = x.flatten()
        return torch.dot(flat, flat)
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=kind)
    return norms.square().sum()
