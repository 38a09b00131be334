"""Attention-score MSE in time linear in L, from Gram matrices: no score is ever computed.

With X = [Q_s, -r Q_t], Y = [K_s, K_t] and r = scale_t / scale_s the difference of the maps is D = scale_s X Y^T, so
    |D|^2 = scale_s^2 <X^T X, Y^T Y>,   D K_s = scale_s X (Y^T Y)_s,   D^T Q_s = scale_s Y (X^T X)_s,
where (.)_s are the first d_s columns: matrices of (d_s + d_t)^2 for each sequence and head instead of maps of L^2.

Exact in exact arithmetic. In float32 the value is a difference of large numbers: its relative error is about
1e-7 * kappa / rho^2, rho = |D| / |A_t|, while the gradient's is about 1e-7 / rho, so that gradients stay good long
after the value is noise. Gram matrices summed in float64 make the value good too.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.exact import AttentionFunction, exact_products, widest
from engine.kernels.inputs import Attention

ENTRIES_AT_ONCE = {"cpu": 2**18, "cuda": 2**28}
"""Entries of the joined queries of the sequences that are worked on together. CPU: 1 MiB in fp32, half of a core's
cache."""


class _GramMSE(AttentionFunction):
    @staticmethod
    def forward(
        ctx: Any,
        q_s: torch.Tensor,
        k_s: torch.Tensor,
        inputs: Attention,
        factor: float,
        accumulate: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, q_t, k_t, scale_s, scale_t, *_ = inputs
        mask = inputs.rows.mask
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kind = widest(q_s, k_s, q_t, k_t)
        B, H, L, d_s = q_s.shape
        most = min(B, max(1, ENTRIES_AT_ONCE[q_s.device.type] // (H * L * (d_s + q_t.shape[-1]))))
        pads = None if mask is None else ~mask[:, None, :, None]
        sums, targets, d_queries, d_keys = [], [], [], []
        with exact_products(q_s.device):
            for start in range(0, B, most):
                part = slice(start, start + most)
                part_pads = None if pads is None else pads[part]
                queries = _joined(q_s[part], q_t[part], factor=-scale_t / scale_s, kind=kind, pads=part_pads)
                keys = _joined(k_s[part], k_t[part], factor=1.0, kind=kind, pads=part_pads)
                of_queries, of_keys = (_gram(x, accumulate) for x in (queries, keys))
                sums.append(_dot(of_queries, of_keys))
                targets.append(_dot(of_queries[..., d_s:, d_s:], of_keys[..., d_s:, d_s:]))
                if needs_gradient:
                    d_queries.append(queries @ of_keys[..., :d_s].to(kind))
                    d_keys.append(keys @ of_queries[..., :d_s].to(kind))
        factor *= scale_s * scale_s
        if needs_gradient:
            ctx.save_for_backward(torch.cat(d_queries), torch.cat(d_keys))
            ctx.factor, ctx.dtypes = 2.0 * factor, (q_s.dtype, k_s.dtype)
        value, target = ((torch.stack(parts).sum() * factor).to(kind) for parts in (sums, targets))
        ctx.mark_non_differentiable(target)
        return value, target


def _joined(
    first: torch.Tensor, second: torch.Tensor, *, factor: float, kind: torch.dtype, pads: torch.Tensor | None
) -> torch.Tensor:
    """Returns [first, factor * second] (n, H, L, d + e), 0 at pads whatever stands there."""
    width = first.shape[-1]
    joined = torch.empty(*first.shape[:3], width + second.shape[-1], dtype=kind, device=first.device)
    joined[..., :width].copy_(first)
    joined[..., width:].copy_(second)
    if factor != 1.0:
        joined[..., width:].mul_(factor)
    return joined if pads is None else joined.masked_fill_(pads, 0.0)


def _gram(x: torch.Tensor, accumulate: torch.dtype) -> torch.Tensor:
    wide = x.to(accumulate)
    return wide.transpose(-1, -2) @ wide


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.flatten(), b.flatten())


def score_mse(
    inputs: Attention, *, factor: float, accumulate: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factor * sum((A_s - A_t)^2), differentiable, and factor * sum(A_t^2), over padded sequences, all tokens
    of which attend to each other. All have the same number of heads; factor is 1 / (H * token_pairs). accumulate: in
    what Gram matrices are summed, float32 or float64."""
    if widest(inputs.q_s, inputs.q_t) == torch.float64:
        accumulate = torch.float64
    value, target = _GramMSE.apply(inputs.q_s, inputs.k_s, inputs, factor, accumulate)
    return value, target
