"""KL of attention distributions by tiles: P = softmax(scale * Q K^T), with the gradient, some rows at a time.

value = factor * sum over real rows of KL(P_t || P_s); with dS = P_s - P_t on real rows (0 elsewhere) the gradients are
dQ_s = factor * scale_s dS K_s and dK_s = factor * scale_s dS^T Q_s. The difference of the probabilities is formed
before any product, in float32: as a difference of two products it would lose its digits where student and teacher agree
(140 % of the gradient at a difference of 1e-3 in 16 bits). Memory grows with L, not with L^2.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.attention_tile import add_products, outside_of_tile, tiles, wide_maps
from engine.kernels.exact import AttentionFunction, exact_products, widest
from engine.kernels.inputs import Attention


class _SoftmaxKL(AttentionFunction):
    @staticmethod
    def forward(ctx: Any, q_s: torch.Tensor, k_s: torch.Tensor, inputs: Attention, factor: float) -> torch.Tensor:
        _, _, q_t, k_t, scale_s, scale_t, *_ = inputs
        mask = inputs.rows.mask
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kind = widest(q_s, k_s, q_t, k_t)
        sums: list[torch.Tensor] = []
        d_queries, d_keys = (torch.zeros(x.shape, dtype=kind, device=x.device) if wanted else None for x in (q_s, k_s))
        pads = None if mask is None else ~mask[:, None, :, None]
        with exact_products(q_s.device):
            for tile in tiles(q_s, inputs.window_s):
                b, h, i, j = tile
                unseen_s, unseen_t = (
                    outside_of_tile(tile, q_s.shape[2], window, q_s.device)
                    for window in (inputs.window_s, inputs.window)
                )
                row_pads, key_pads = (None, None) if pads is None else (pads[b, :, i], pads[b, :, j])
                rows_s, rows_t = (wide_maps(x[b, h, i], kind, row_pads) for x in (q_s, q_t))
                keys_s, keys_t = (wide_maps(x[b, h, j], kind, key_pads) for x in (k_s, k_t))
                heads = len(range(*h.indices(q_s.shape[1])))
                no_key, no_row = (_of_heads(x, heads) for x in (key_pads, row_pads))
                log_t = _log_probabilities(rows_t, keys_t, scale_t, no_key, unseen_t)
                log_s = _log_probabilities(rows_s, keys_s, scale_s, no_key, unseen_s)
                p_t = log_t.exp()
                per_row = p_t.mul(log_t.sub_(log_s)).sum(-1, keepdim=True)
                sums.append(_real(per_row, no_row).sum())
                if d_queries is not None and d_keys is not None:
                    difference = _real(log_s.exp_().sub_(p_t), no_row)
                    add_products(d_queries[b, h, i], d_keys[b, h, j], difference, rows_s, keys_s)
        if d_queries is not None and d_keys is not None:
            ctx.save_for_backward(d_queries, d_keys)
            ctx.factor, ctx.dtypes = factor * scale_s, (q_s.dtype, k_s.dtype)
        return torch.stack(sums).sum() * factor


def _of_heads(pads: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Returns (n * heads, L, 1) of (n, 1, L, 1)."""
    return None if pads is None else pads.expand(-1, heads, -1, -1).flatten(0, 1)


def _real(x: torch.Tensor, pads: torch.Tensor | None) -> torch.Tensor:
    return x if pads is None else x.masked_fill(pads, 0.0)


def _log_probabilities(
    rows: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    key_pads: torch.Tensor | None,
    unseen: torch.Tensor | None,
) -> torch.Tensor:
    """Returns log softmax (n * H, rows, keys). unseen: (rows, keys) bool, pairs outside of the window."""
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)
    lowest = torch.finfo(scores.dtype).min  # not -inf: a sequence of padding only has uniform rows, not NaN ones
    if key_pads is not None:
        scores.masked_fill_(key_pads.transpose(-1, -2), lowest)
    if unseen is not None:
        scores.masked_fill_(unseen, lowest)
    return torch.log_softmax(scores, dim=-1)


def softmax_kl(inputs: Attention, *, factor: float) -> torch.Tensor:
    """Returns factor * sum over heads and real rows of KL(P_t || P_s), over padded sequences. All have the same number
    of heads; factor is 1 / (H * tokens). Windows: as in reference.attention_probs_kl."""
    value: torch.Tensor = _SoftmaxKL.apply(inputs.q_s, inputs.k_s, inputs, factor)
    return value
