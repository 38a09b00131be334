"""Attention-score MSE with its gradient in one pass: reference.attention_score_mse without maps kept for the backward.

With D = A_s - A_t and c = 1 / (H * token_pairs): value = c * sum(D^2), dQ_s = 2 c scale_s D K_s, and
dK_s = 2 c scale_s D^T Q_s. D itself is one product of concatenated matrices, [scale_s Q_s, -scale_t Q_t] [K_s, K_t]^T,
and is dropped once value and gradients are known, so that the maps of one sequence (on a GPU: of some) are in memory at
a time, instead of several of the whole batch for each layer pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from engine.kernels.reference import check_same_shape, normaliser, repeat_heads, without_padding

MAP_ENTRIES_AT_ONCE = 2**26
"""On a GPU, 256 MiB in fp32: enough to fill it, and far from the 2^31 elements that a dot product takes."""


def _parts(queries: torch.Tensor) -> list[slice]:
    """(B, H, L, d) -> the sequences that are worked on together: one on a CPU, whose maps fit into the cache."""
    B, H, L, _ = queries.shape
    size = 1 if queries.device.type == "cpu" else max(1, MAP_ENTRIES_AT_ONCE // (H * L * L))
    return [slice(start, start + size) for start in range(0, B, size)]


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
            queries, keys = without_padding(q_s, mask), without_padding(k_s, mask)
            left = torch.cat([queries * scale_s, without_padding(q_t, mask) * -scale_t], dim=-1)
            right = torch.cat([keys, without_padding(k_t, mask)], dim=-1)
            d_queries, d_keys = torch.empty_like(queries), torch.empty_like(keys)
            sums = []
            for at in _parts(left):
                difference = left[at] @ right[at].transpose(-1, -2)
                flat = difference.flatten()
                sums.append(torch.dot(flat, flat))
                if wanted:
                    torch.matmul(difference, keys[at], out=d_queries[at])
                    torch.matmul(difference.transpose(-1, -2), queries[at], out=d_keys[at])
            if wanted:
                ctx.save_for_backward(d_queries, d_keys)
                ctx.factor, ctx.dtypes = 2.0 * factor * scale_s, (q_s.dtype, k_s.dtype)
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
