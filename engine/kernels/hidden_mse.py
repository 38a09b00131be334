"""Hidden-state MSE with its gradient in few passes: reference.hidden_mse, keeping only the difference for the backward.

With D = S - T over real tokens and c = 1 / (tokens * D's width): value = c * sum(D^2), dS = 2 c D. Some sequences are
worked on at a time, so that they are still in the cache when they are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from engine.kernels.reference import check_same_shape, normaliser

ENTRIES_AT_ONCE = {"cpu": 2**18, "cuda": 2**28}
"""CPU: 1 MiB in fp32, half of a core's cache. CUDA: no more than a dot product takes."""


class _HiddenMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, factor: float
    ) -> torch.Tensor:
        B, L, D = student.shape
        kind = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        difference = torch.empty(B, L, D, dtype=kind, device=student.device)
        pads = None if mask is None else ~mask[:, :, None]
        most = max(1, ENTRIES_AT_ONCE[student.device.type] // (L * D))
        sums = []
        for start in range(0, B, most):
            at = slice(start, start + most)
            part = difference[at].copy_(student[at]).sub_(teacher[at])  # widened first, then subtracted
            if pads is not None:
                part.masked_fill_(pads[at], 0.0)
            flat = part.flatten()
            sums.append(torch.dot(flat, flat))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(difference)
            ctx.factor, ctx.dtype = 2.0 * factor, student.dtype
        return torch.stack(sums).sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        gradient = torch.empty(difference.shape, dtype=ctx.dtype, device=difference.device)
        return torch.mul(difference, upstream * ctx.factor, out=gradient), None, None, None


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, tokens: float) -> torch.Tensor:
    """The same as reference.hidden_mse, in value and gradient to rounding; the teacher gets no gradient."""
    check_same_shape("hidden states", student.shape, teacher.shape)
    factor = 1.0 / normaliser(tokens * student.shape[-1])
    value: torch.Tensor = _HiddenMSE.apply(student, teacher, mask, factor)
    return value
