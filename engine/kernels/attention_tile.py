"""Attention-score MSE by tiles: the difference of the two score maps, with the gradient, some rows at a time.

With D = A_s - A_t, A = scale * Q K^T, and c = 1 / (H * token_pairs): value = c * sum(D^2), dQ_s = 2 c scale_s D K_s,
dK_s = 2 c scale_s D^T Q_s. A tile of D is made, used for the value and both gradients, and dropped, so that memory
grows with L and not with L^2. Whole sequences form a tile where their maps are small: on a CPU tiles stay in its cache
(2 to 3 times faster than whole batches, whose new pages cost more than the products), on a GPU they keep maps few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.kernels.exact import AttentionFunction, exact_products, square_sum, widest
from engine.kernels.inputs import Attention
from engine.kernels.reference import ZEROED_SCORE_TINYBERT, outside

MAP_ENTRIES_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
"""Entries of score maps that are worked on together. CPU: 2 MiB in fp32, a core's cache. CUDA: 256 MiB, enough to fill
it, and far from the 2^31 elements that a dot product takes."""
SMALLEST_TILE = 64
"""Rows of a tile that a window makes small."""

Tile = tuple[slice, slice, slice, slice]
"""Sequences, heads and rows (queries) that are worked on together, and all the keys in their window."""


def tiles(queries: torch.Tensor, window: int | None) -> Iterator[Tile]:
    """Cuts the B * H maps (L, L) of queries (B, H, L, d) into tiles of at most MAP_ENTRIES_AT_ONCE entries, or one
    row."""
    (B, H, L, _), most = queries.shape, MAP_ENTRIES_AT_ONCE[queries.device.type]
    sequences = min(B, max(1, most // (H * L * L)))
    heads = H if sequences > 1 else min(H, max(1, most // (L * L)))
    rows = L if heads > 1 or most >= L * L else max(1, most // L)
    if window is not None:  # more rows would have more keys outside of their windows than in them
        rows = min(rows, max(SMALLEST_TILE, window))
    for b in range(0, B, sequences):
        for h in range(0, H, heads):
            for i in range(0, L, rows):
                keys = slice(0, L) if window is None else slice(max(0, i - window), min(L, i + rows + window))
                yield slice(b, b + sequences), slice(h, h + heads), slice(i, i + rows), keys


def outside_of_tile(tile: Tile, L: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Returns (rows, keys) bool of the pairs that are further apart than the window; None for none."""
    if window is None:
        return None
    positions = torch.arange(L, device=device)
    return outside(window, positions[tile[2]], positions[tile[3]])


class _ScoreMSE(AttentionFunction):
    @staticmethod
    def forward(
        ctx: Any,
        q_s: torch.Tensor,
        k_s: torch.Tensor,
        inputs: Attention,
        factor: float,
        tinybert: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, q_t, k_t, scale_s, scale_t, *_ = inputs
        mask, window = inputs.rows.mask, inputs.window
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kind = widest(q_s, k_s, q_t, k_t)
        sums, targets = [], []
        d_queries, d_keys = (torch.zeros(x.shape, dtype=kind, device=x.device) if wanted else None for x in (q_s, k_s))
        pads = None if mask is None else ~mask[:, None, :, None]
        with exact_products(q_s.device):
            for tile in tiles(q_s, window):
                b, h, i, j = tile
                unseen = outside_of_tile(tile, q_s.shape[2], window, q_s.device)
                row_pads = None if pads is None or tinybert else pads[b, :, i]
                key_pads = None if pads is None else pads[b, :, j]
                rows_s, rows_t = (wide_maps(x[b, h, i], kind, row_pads) for x in (q_s, q_t))
                keys_s, keys_t = (wide_maps(x[b, h, j], kind, key_pads) for x in (k_s, k_t))
                scores_t = torch.bmm(rows_t, keys_t.transpose(1, 2)).mul_(scale_t)
                if unseen is not None:
                    scores_t.masked_fill_(unseen, 0.0)
                if tinybert:
                    scores_s = torch.bmm(rows_s, keys_s.transpose(1, 2)).mul_(scale_s)
                    below = scores_s <= ZEROED_SCORE_TINYBERT
                    if unseen is not None:
                        below |= unseen
                    scores_t.masked_fill_(scores_t <= ZEROED_SCORE_TINYBERT, 0.0)
                    targets.append(square_sum(scores_t, kind))
                    difference = scores_s.masked_fill_(below, 0.0).sub_(scores_t)
                    sums.append(square_sum(difference, kind))
                    difference.masked_fill_(below, 0.0)
                else:
                    targets.append(square_sum(scores_t, kind))
                    difference = scores_t.baddbmm_(rows_s, keys_s.transpose(1, 2), beta=-1.0, alpha=scale_s)
                    if unseen is not None:
                        difference.masked_fill_(unseen, 0.0)
                    sums.append(square_sum(difference, kind))
                if d_queries is not None and d_keys is not None:
                    add_products(d_queries[b, h, i], d_keys[b, h, j], difference, rows_s, keys_s)
        if d_queries is not None and d_keys is not None:
            ctx.save_for_backward(d_queries, d_keys)
            ctx.factor, ctx.dtypes = 2.0 * factor * scale_s, (q_s.dtype, k_s.dtype)
        value, target = (torch.stack(parts).sum() * factor for parts in (sums, targets))
        ctx.mark_non_differentiable(target)
        return value, target


def wide_maps(x: torch.Tensor, kind: torch.dtype, pads: torch.Tensor | None) -> torch.Tensor:
    """Returns (n * H, L, d) of (n, H, L, d) in full precision, each head's rows together, and 0 at pads whatever stands
    there. Products of heads that lie apart in memory would each copy them first."""
    wide = torch.empty(x.shape, dtype=kind, device=x.device).copy_(x)
    return (wide if pads is None else wide.masked_fill_(pads, 0.0)).flatten(0, 1)


def add_products(
    d_queries: torch.Tensor, d_keys: torch.Tensor, difference: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> None:
    """Sets d_queries = difference keys and adds difference^T queries to d_keys; gradients (n, H, rows, d), others
    without n."""
    d_queries.copy_(torch.bmm(difference, keys).view(d_queries.shape))
    d_keys += torch.bmm(difference.transpose(1, 2), queries).view(d_keys.shape)


def score_mse(inputs: Attention, *, factor: float, tinybert: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factor * sum((A_s - A_t)^2), differentiable, and factor * sum(A_t^2), both over the pairs in the window
    of padded sequences. All have the same number of heads; factor is 1 / (H * token_pairs). tinybert: as
    reference.attention_score_mse_tinybert."""
    value, target = _ScoreMSE.apply(inputs.q_s, inputs.k_s, inputs, factor, tinybert)
    return value, target
