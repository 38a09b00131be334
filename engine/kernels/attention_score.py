"""Attention-score MSE with its gradient in one pass: reference.attention_score_mse without maps kept for the backward.

With D = Q_s K_s^T - r Q_t K_t^T, r = scale_t / scale_s, and c = scale_s^2 / (H * token_pairs): value = c * sum(D^2),
dQ_s = 2 c D K_s, and dK_s = 2 c D^T Q_s. D itself is one product of concatenated matrices, [Q_s, -r Q_t] [K_s, K_t]^T,
and is dropped once value and gradients are known. Some sequences are worked on at a time, in buffers that the next ones
use again: on a CPU these stay in its cache (2 to 3 times faster than whole batches, whose new pages cost more than the
products), on a GPU they keep L x L maps few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from engine.kernels.reference import check_same_shape, normaliser, repeat_heads

MAP_ENTRIES_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
"""CPU: 2 MiB in fp32, a core's cache. CUDA: 256 MiB, enough to fill it, and far from the 2^31 elements that a dot
product takes."""


class _Joined:
    """[first, factor * second] of some sequences at a time, (n, H, L, d + e), in one buffer."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor, *, factor: float, most: int) -> None:
        self._first, self._second, self._factor = first, second, factor
        kind = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
        width = first.shape[-1] + second.shape[-1]
        self._buffer = torch.empty(most, *first.shape[1:3], width, dtype=kind, device=first.device)

    def __call__(self, at: slice, pads: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The joined matrices and, of them, the first. pads: (n, 1, L, 1) bool; 0 there, whatever the tensors hold."""
        width = self._first.shape[-1]
        first = self._first[at]
        joined = self._buffer[: len(first)]
        joined[..., :width].copy_(first)
        joined[..., width:].copy_(self._second[at])
        if self._factor != 1.0:
            joined[..., width:].mul_(self._factor)
        if pads is not None:
            joined.masked_fill_(pads, 0.0)
        return joined, joined[..., :width]


class _ScoreMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_s: torch.Tensor,
        k_s: torch.Tensor,
        q_t: torch.Tensor,
        k_t: torch.Tensor,
        scale_s: float,
        scale_t: float,
        mask: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(q_s.device.type, enabled=False):
            B, H, L, _ = q_s.shape
            most = min(B, max(1, MAP_ENTRIES_AT_ONCE[q_s.device.type] // (H * L * L)))
            left = _Joined(q_s, q_t, factor=-scale_t / scale_s, most=most)
            right = _Joined(k_s, k_t, factor=1.0, most=most)
            pads = None if mask is None else ~mask[:, None, :, None]
            sums, d_queries, d_keys = [], [], []
            for start in range(0, B, most):
                at = slice(start, start + most)
                (both_queries, queries), (both_keys, keys) = (
                    joined(at, None if pads is None else pads[at]) for joined in (left, right)
                )
                difference = both_queries @ both_keys.transpose(-1, -2)
                flat = difference.flatten()
                sums.append(torch.dot(flat, flat))
                if wanted:
                    d_queries.append(difference @ keys)
                    d_keys.append(difference.transpose(-1, -2) @ queries)
            factor *= scale_s * scale_s
            if wanted:
                ctx.save_for_backward(torch.cat(d_queries), torch.cat(d_keys))
                ctx.factor, ctx.dtypes = 2.0 * factor, (q_s.dtype, k_s.dtype)
            return torch.stack(sums).sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_queries, d_keys = ctx.saved_tensors
        scale = upstream * ctx.factor
        dtype_q, dtype_k = ctx.dtypes
        return (d_queries * scale).to(dtype_q), (d_keys * scale).to(dtype_k), None, None, None, None, None, None


def attention_score_mse(
    q_s: torch.Tensor,
    k_s: torch.Tensor,
    q_t: torch.Tensor,
    k_t: torch.Tensor,
    *,
    scale_s: float,
    scale_t: float,
    mask: torch.Tensor | None,
    token_pairs: float,
) -> torch.Tensor:
    """The same as reference.attention_score_mse, in values and gradients to rounding."""
    check_same_shape("(batch, heads, length)", q_s.shape[:3], q_t.shape[:3])
    heads = q_s.shape[1]
    factor = 1.0 / normaliser(heads * token_pairs)
    value: torch.Tensor = _ScoreMSE.apply(
        q_s, repeat_heads(k_s, heads), q_t, repeat_heads(k_t, heads), scale_s, scale_t, mask, factor
    )
    return value
