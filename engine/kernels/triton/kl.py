"""KL of attention distributions as Triton kernels; formulas and the reason for their order:
engine/kernels/softmax_kl.py.

Three passes over tiles that never leave the registers: the log-sum-exp of each row of both sides; then, for each block
of queries, value and dQ; then, for each block of keys, dK. No atomics, fixed order: the same bits each time."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.exact import AttentionFunction
from engine.kernels.inputs import Attention
from engine.kernels.triton.common import (
    DTYPES,
    STAGES,
    Layout,
    blocks_of_window,
    constants,
    contiguous_rows,
    dot,
    empty_gradients,
    in_window,
    load_rows,
    padded_width,
    widths,
)

ROWS, COLUMNS = 64, 32


def warps_of(width_t: int) -> int:
    """Returns so many that a tile beside rows of that width fits into their registers."""
    return 4 if width_t <= 64 else 8


LOWEST = -3.0e38
"""Score in the place of -inf, whose difference with itself is NaN."""


@triton.jit
def _real_rows(MASK, rows, length, MASKED: tl.constexpr):
    real = rows < length
    if MASKED:
        real = real & (tl.load(MASK + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def _log_sums(
    Q, K, STARTS, LENGTHS, MASK, OUT, scale, window, q_b, q_h, q_l, k_b, k_h, k_l, out_b, out_h, mask_b,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes OUT[b, h, start + i] = log sum over real keys j of exp(scale q_i k_j), for every position i of a sequence.
    WINDOWED: over those that are `window` or less away."""
    block, pid = tl.program_id(0), tl.program_id(1)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    start, length = tl.load(STARTS + b).to(tl.int64), tl.load(LENGTHS + b)
    MASK += b * mask_b
    rows = block * BM + tl.arange(0, BM)
    q = load_rows(Q + b * q_b + h * q_h + start * q_l, rows, _real_rows(MASK, rows, length, MASKED), q_l, WIDTH, BLOCK)
    K += b * k_b + h * k_h + start * k_l
    highest = tl.full((BM,), LOW, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    start_at, end_at = 0, length
    if WINDOWED:
        start_at, end_at = blocks_of_window(block * BM, BM, BN, length, window)
    for first in range(start_at, end_at, BN):
        keys = first + tl.arange(0, BN)
        real = _real_rows(MASK, keys, length, MASKED)
        k = load_rows(K, keys, real, k_l, WIDTH, BLOCK)
        scores = dot(q, tl.trans(k), PRECISION, WIDEN) * scale
        seen = real[None, :]
        if WINDOWED:
            seen = seen & in_window(rows, keys, window)
        scores = tl.where(seen, scores, LOW)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        raised = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        total = total * tl.exp(highest - higher) + tl.sum(raised, axis=1)
        highest = higher
    # a sequence of padding only has no sum; its rows do not count
    log_sum = highest + tl.log(tl.where(total > 0.0, total, 1.0))
    tl.store(OUT + b * out_b + h * out_h + start + rows, log_sum, mask=rows < length)


@triton.jit
def _by_queries(
    Q_S, K_S, Q_T, K_T, D_Q, LSE_S, LSE_T, STARTS, LENGTHS, MASK, PART, scale_s, scale_t, window_s, window_t,
    q_s_b, q_s_h, q_s_l, k_s_b, k_s_h, k_s_l, q_t_b, q_t_h, q_t_l, k_t_b, k_t_h, k_t_l, d_b, d_h, d_l,
    lse_b, lse_h, mask_b,
    H: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes a part of the value, and the gradient of the BM queries that a program owns."""
    block, pid = tl.program_id(0), tl.program_id(1)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    start, length = tl.load(STARTS + b).to(tl.int64), tl.load(LENGTHS + b)
    MASK += b * mask_b
    rows = block * BM + tl.arange(0, BM)
    own = _real_rows(MASK, rows, length, MASKED)
    q_s = load_rows(Q_S + b * q_s_b + h * q_s_h + start * q_s_l, rows, own, q_s_l, WIDTH_S, BLOCK_S)
    q_t = load_rows(Q_T + b * q_t_b + h * q_t_h + start * q_t_l, rows, own, q_t_l, WIDTH_T, BLOCK_T)
    lse_s = tl.load(LSE_S + b * lse_b + h * lse_h + start + rows, mask=own, other=0.0)
    lse_t = tl.load(LSE_T + b * lse_b + h * lse_h + start + rows, mask=own, other=0.0)
    K_S += b * k_s_b + h * k_s_h + start * k_s_l
    K_T += b * k_t_b + h * k_t_h + start * k_t_l
    gradient = tl.zeros((BM, BLOCK_S), dtype=tl.float32)
    value = tl.zeros((BM,), dtype=tl.float32)
    start_at, end_at = 0, length
    if WINDOWED:
        start_at, end_at = blocks_of_window(block * BM, BM, BN, length, window_s)
    for first in range(start_at, end_at, BN):
        keys = first + tl.arange(0, BN)
        real = _real_rows(MASK, keys, length, MASKED)
        seen_s = own[:, None] & real[None, :]
        seen_t = seen_s
        if WINDOWED:
            seen_s = seen_s & in_window(rows, keys, window_s)
            seen_t = seen_t & in_window(rows, keys, window_t)
        k_s = load_rows(K_S, keys, real, k_s_l, WIDTH_S, BLOCK_S)
        k_t = load_rows(K_T, keys, real, k_t_l, WIDTH_T, BLOCK_T)
        log_s = dot(q_s, tl.trans(k_s), PRECISION, WIDEN) * scale_s - lse_s[:, None]
        log_t = dot(q_t, tl.trans(k_t), PRECISION, WIDEN) * scale_t - lse_t[:, None]
        p_t = tl.where(seen_t, tl.exp(log_t), 0.0)
        value += tl.sum(tl.where(seen_t, p_t * (log_t - log_s), 0.0), axis=1)
        if GRADIENT:
            difference = tl.where(seen_s, tl.exp(log_s), 0.0) - p_t
            gradient += dot(difference.to(q_s.dtype), k_s, PRECISION, WIDEN)
    tl.store(PART + pid * tl.num_programs(0) + block, tl.sum(value, axis=0))
    if GRADIENT:
        columns = tl.arange(0, BLOCK_S)
        tl.store(
            D_Q + b * d_b + h * d_h + (start + rows)[:, None] * d_l + columns[None, :],
            gradient.to(D_Q.dtype.element_ty),
            mask=(rows < length)[:, None] & (columns[None, :] < WIDTH_S),
        )


@triton.jit
def _by_keys(
    Q_S, K_S, Q_T, K_T, D_K, LSE_S, LSE_T, STARTS, LENGTHS, MASK, scale_s, scale_t, window_s, window_t,
    q_s_b, q_s_h, q_s_l, k_s_b, k_s_h, k_s_l, q_t_b, q_t_h, q_t_l, k_t_b, k_t_h, k_t_l, d_b, d_h, d_l,
    lse_b, lse_h, mask_b,
    H: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the BM keys that a program owns. Tiles are computed transposed, keys by queries, so that
    no accumulator has to be transposed."""
    block, pid = tl.program_id(0), tl.program_id(1)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    start, length = tl.load(STARTS + b).to(tl.int64), tl.load(LENGTHS + b)
    MASK += b * mask_b
    rows = block * BM + tl.arange(0, BM)
    own = _real_rows(MASK, rows, length, MASKED)
    k_s = load_rows(K_S + b * k_s_b + h * k_s_h + start * k_s_l, rows, own, k_s_l, WIDTH_S, BLOCK_S)
    k_t = load_rows(K_T + b * k_t_b + h * k_t_h + start * k_t_l, rows, own, k_t_l, WIDTH_T, BLOCK_T)
    Q_S += b * q_s_b + h * q_s_h + start * q_s_l
    Q_T += b * q_t_b + h * q_t_h + start * q_t_l
    LSE_S += b * lse_b + h * lse_h + start
    LSE_T += b * lse_b + h * lse_h + start
    gradient = tl.zeros((BM, BLOCK_S), dtype=tl.float32)
    start_at, end_at = 0, length
    if WINDOWED:
        start_at, end_at = blocks_of_window(block * BM, BM, BN, length, window_s)
    for first in range(start_at, end_at, BN):
        queries = first + tl.arange(0, BN)
        real = _real_rows(MASK, queries, length, MASKED)
        counts = own[:, None] & real[None, :]
        q_s = load_rows(Q_S, queries, real, q_s_l, WIDTH_S, BLOCK_S)
        q_t = load_rows(Q_T, queries, real, q_t_l, WIDTH_T, BLOCK_T)
        lse_s = tl.load(LSE_S + queries, mask=real, other=0.0)
        lse_t = tl.load(LSE_T + queries, mask=real, other=0.0)
        p_s = tl.exp(dot(k_s, tl.trans(q_s), PRECISION, WIDEN) * scale_s - lse_s[None, :])
        p_t = tl.exp(dot(k_t, tl.trans(q_t), PRECISION, WIDEN) * scale_t - lse_t[None, :])
        if WINDOWED:
            p_t = tl.where(in_window(rows, queries, window_t), p_t, 0.0)
            counts = counts & in_window(rows, queries, window_s)
        difference = tl.where(counts, p_s - p_t, 0.0)
        gradient += dot(difference.to(k_s.dtype), q_s, PRECISION, WIDEN)
    columns = tl.arange(0, BLOCK_S)
    tl.store(
        D_K + b * d_b + h * d_h + (start + rows)[:, None] * d_l + columns[None, :],
        gradient.to(D_K.dtype.element_ty),
        mask=(rows < length)[:, None] & (columns[None, :] < WIDTH_S),
    )


def launch(inputs: Attention, *, gradient: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the float32 sum of KL over rows, and [dS K_s, dS^T Q_s] if `gradient`, in the inputs' bfloat16 or in
    float32."""
    inputs, layout = contiguous_rows(inputs), Layout.from_inputs(inputs)
    q_s, k_s, q_t, k_t, *scales = inputs[:6]
    sides = q_s, k_s, q_t, k_t
    windows = inputs.window_s, inputs.window
    reach = [layout.longest if window is None else window for window in windows]
    grid = (triton.cdiv(layout.longest, ROWS), len(layout.starts) * q_s.shape[1])
    settings = {
        "BM": ROWS,
        "BN": COLUMNS,
        "MASKED": layout.mask is not None,
        "WINDOWED": windows[1] is not None,
        "num_warps": warps_of(q_t.shape[-1]),
        "num_stages": STAGES,
        **constants(inputs),
    }
    log_sums = [torch.empty(q_s.shape[:3], dtype=torch.float32, device=q_s.device) for _ in range(2)]
    ends = (0 if layout.packed else log_sums[0].stride(0), log_sums[0].stride(1), layout.mask_stride)
    for q, k, scale, out, window in zip(sides[::2], sides[1::2], scales, log_sums, reach, strict=True):
        _log_sums[grid](
            q, k, *layout.tensors(), out, scale, window, *layout.strides(q, k), *ends,
            WIDTH=q.shape[-1], BLOCK=padded_width(q.shape[-1]), LOW=LOWEST, **settings,
        )  # fmt: skip
    grads = empty_gradients([q_s, k_s]) if gradient else []
    d_q, d_k = grads if gradient else (q_s, k_s)
    part = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=q_s.device)
    settings |= widths(inputs)
    _by_queries[grid](
        *sides, d_q, *log_sums, *layout.tensors(), part, *scales, *reach, *layout.strides(*sides, d_q), *ends,
        GRADIENT=gradient, **settings,
    )  # fmt: skip
    if gradient:
        _by_keys[grid](
            *sides, d_k, *log_sums, *layout.tensors(), *scales, *reach, *layout.strides(*sides, d_k), *ends, **settings
        )  # fmt: skip
    return part.sum(), grads


class _SoftmaxKL(AttentionFunction):
    @staticmethod
    def forward(ctx: Any, q_s: torch.Tensor, k_s: torch.Tensor, inputs: Attention, factor: float) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total, grads = launch(inputs, gradient=wanted)
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.factor, ctx.dtypes = factor * inputs.scale_s, (q_s.dtype, k_s.dtype)
        return total * factor


def softmax_kl(inputs: Attention, *, factor: float) -> torch.Tensor:
    """Returns what softmax_kl.softmax_kl does; all tensors of one dtype (float32, bfloat16, float16), in padded or
    packed sequences."""
    assert inputs.q_s.dtype in DTYPES, inputs.q_s.dtype
    value: torch.Tensor = _SoftmaxKL.apply(inputs.q_s, inputs.k_s, inputs, factor)
    return value
