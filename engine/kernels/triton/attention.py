"""Attention-score MSE as Triton kernels: scores live in registers only, and gradients are ready after the forward.

Formulas: engine/kernels/attention_tile.py. Up to ONE_PROGRAM tokens one program does a whole (sequence, head): each
input is read once, each gradient written once. Longer ones are cut into rows: a program owns BM rows of one side,
walks over the other side, and writes the gradient of its own rows; the second launch swaps the sides, so that no two
programs write to one place. No atomics, fixed order: the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.exact import AttentionFunction
from engine.kernels.inputs import Attention
from engine.kernels.reference import ZEROED_SCORE_TINYBERT
from engine.kernels.triton.common import (
    DTYPES,
    STAGES,
    Layout,
    blocks_of_window,
    constants,
    contiguous_rows,
    dot,
    dot_to,
    empty_gradients,
    in_window,
    load_rows,
    widths,
)

ONE_PROGRAM = 128
"""Most tokens of a sequence that one program takes: its map of 128 x 128 fp32 numbers fills the registers of 8
warps."""
ROWS, WARPS = 128, 8


def columns_of(width_t: int) -> int:
    """Returns the columns of a tile: what fits into the registers of an A100 beside rows of that width."""
    return 64 if width_t <= 64 else 32


@triton.jit
def _difference(
    own_s, other_s, own_t, other_t, scale_s, scale_t, own, other, window,
    CUT: tl.constexpr, TINYBERT: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Returns, for one tile, sum((A_s - A_t)^2) and sum(A_t^2), both / scale_s^2, and the matrix that the gradients are
    products of: (A_s - A_t) / scale_s. One accumulator serves both sides: two would not fit into the registers.
    WINDOWED: only pairs of positions own and other that are `window` or less apart count."""
    scores = dot(own_t, tl.trans(other_t), PRECISION, WIDEN) * (scale_t / scale_s)
    if WINDOWED:
        scores = tl.where(in_window(own, other, window), scores, 0.0)
    if TINYBERT:
        scores = tl.where(scores * scale_s <= CUT, 0.0, scores)
    targets = tl.sum(tl.sum(scores * scores, axis=1), axis=0)
    if TINYBERT:
        of_student = dot(own_s, tl.trans(other_s), PRECISION, WIDEN)
        passed = of_student * scale_s > CUT
        scores = tl.where(passed, of_student, 0.0) - scores
    else:
        scores = dot_to(own_s, tl.trans(other_s), -scores, PRECISION, WIDEN)
    if WINDOWED:
        scores = tl.where(in_window(own, other, window), scores, 0.0)
    value = tl.sum(tl.sum(scores * scores, axis=1), axis=0)
    if TINYBERT:
        scores = tl.where(passed, scores, 0.0)
    return value, targets, scores


@triton.jit
def _whole(
    Q_S, K_S, Q_T, K_T, D_Q, D_K, STARTS, LENGTHS, MASK, PART, scale_s, scale_t, window,
    q_s_b, q_s_h, q_s_l, k_s_b, k_s_h, k_s_l, q_t_b, q_t_h, q_t_l, k_t_b, k_t_h, k_t_l,
    d_q_b, d_q_h, d_q_l, d_k_b, d_k_h, d_k_l, mask_b,
    H: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TINYBERT: tl.constexpr, CUT: tl.constexpr,
    WINDOWED: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes a whole (sequence, head) by one program."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    start, length = tl.load(STARTS + b).to(tl.int64), tl.load(LENGTHS + b)
    K_S += b * k_s_b + h * k_s_h + start * k_s_l
    K_T += b * k_t_b + h * k_t_h + start * k_t_l
    D_Q += b * d_q_b + h * d_q_h + start * d_q_l
    D_K += b * d_k_b + h * d_k_h + start * d_k_l
    MASK += b * mask_b
    rows, columns = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    queries = rows < length
    if MASKED and not TINYBERT:  # TinyBERT's padded queries count
        queries = queries & (tl.load(MASK + rows, mask=queries, other=0) != 0)
    q_s = load_rows(Q_S + b * q_s_b + h * q_s_h + start * q_s_l, rows, queries, q_s_l, WIDTH_S, BLOCK_S)
    q_t = load_rows(Q_T + b * q_t_b + h * q_t_h + start * q_t_l, rows, queries, q_t_l, WIDTH_T, BLOCK_T)
    value, target = 0.0, 0.0
    d_q = tl.zeros((BLOCK_L, BLOCK_S), dtype=tl.float32)
    for first in range(0, BLOCK_L, BN):
        keys = first + tl.arange(0, BN)
        inside = keys < length
        real = inside
        if MASKED:
            real = inside & (tl.load(MASK + keys, mask=inside, other=0) != 0)
        # rows that are not read are 0, and so are their scores on both sides
        k_s = load_rows(K_S, keys, real, k_s_l, WIDTH_S, BLOCK_S)
        k_t = load_rows(K_T, keys, real, k_t_l, WIDTH_T, BLOCK_T)
        v, t, difference = _difference(
            q_s, k_s, q_t, k_t, scale_s, scale_t, rows, keys, window, CUT, TINYBERT, WINDOWED, PRECISION, WIDEN
        )
        value += v
        target += t
        if GRADIENT:
            # Rounding the difference costs a relative 2^-9 of itself however small it is: nothing cancels after it.
            difference = difference.to(q_s.dtype)
            d_q = dot_to(difference, k_s, d_q, PRECISION, WIDEN)
            d_k = dot(tl.trans(difference), q_s, PRECISION, WIDEN)
            tl.store(
                D_K + keys[:, None].to(tl.int64) * d_k_l + columns[None, :],
                d_k.to(D_K.dtype.element_ty),
                mask=inside[:, None] & (columns[None, :] < WIDTH_S),
            )
    tl.store(PART + 2 * pid, value)
    tl.store(PART + 2 * pid + 1, target)
    if GRADIENT:
        tl.store(
            D_Q + rows[:, None].to(tl.int64) * d_q_l + columns[None, :],
            d_q.to(D_Q.dtype.element_ty),
            mask=(rows < length)[:, None] & (columns[None, :] < WIDTH_S),
        )


@triton.jit
def _by_rows(
    OWN_S, OTHER_S, OWN_T, OTHER_T, D_OWN, STARTS, LENGTHS, MASK, PART, scale_s, scale_t, window,
    own_s_b, own_s_h, own_s_l, other_s_b, other_s_h, other_s_l, own_t_b, own_t_h, own_t_l,
    other_t_b, other_t_h, other_t_l, d_b, d_h, d_l, mask_b,
    H: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, OWN_MASKED: tl.constexpr, OTHER_MASKED: tl.constexpr, TINYBERT: tl.constexpr,
    CUT: tl.constexpr, WINDOWED: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes BM rows of a (sequence, head) of one side by one program; the difference is symmetric in what is own and
    other, so that one kernel gives dQ (own = queries) and dK (own = keys) without transposing what it has computed."""
    block, pid = tl.program_id(0), tl.program_id(1)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    start, length = tl.load(STARTS + b).to(tl.int64), tl.load(LENGTHS + b)
    own = block * BM + tl.arange(0, BM)
    own_inside = own < length
    own_real = own_inside
    if OWN_MASKED:
        own_real = own_inside & (tl.load(MASK + b * mask_b + own, mask=own_inside, other=0) != 0)
    OTHER_S += b * other_s_b + h * other_s_h + start * other_s_l
    OTHER_T += b * other_t_b + h * other_t_h + start * other_t_l
    own_s = load_rows(OWN_S + b * own_s_b + h * own_s_h + start * own_s_l, own, own_real, own_s_l, WIDTH_S, BLOCK_S)
    own_t = load_rows(OWN_T + b * own_t_b + h * own_t_h + start * own_t_l, own, own_real, own_t_l, WIDTH_T, BLOCK_T)
    gradient = tl.zeros((BM, BLOCK_S), dtype=tl.float32)
    value, target = 0.0, 0.0
    if block * BM < length:
        start_at, end_at = 0, length
        if WINDOWED:
            start_at, end_at = blocks_of_window(block * BM, BM, BN, length, window)
        for first in range(start_at, end_at, BN):
            other = first + tl.arange(0, BN)
            real = other < length
            if OTHER_MASKED:
                real = real & (tl.load(MASK + b * mask_b + other, mask=real, other=0) != 0)
            other_s = load_rows(OTHER_S, other, real, other_s_l, WIDTH_S, BLOCK_S)
            other_t = load_rows(OTHER_T, other, real, other_t_l, WIDTH_T, BLOCK_T)
            v, t, difference = _difference(
                own_s,
                other_s,
                own_t,
                other_t,
                scale_s,
                scale_t,
                own,
                other,
                window,
                CUT,
                TINYBERT,
                WINDOWED,
                PRECISION,
                WIDEN,
            )
            value += v
            target += t
            if GRADIENT:
                gradient = dot_to(difference.to(own_s.dtype), other_s, gradient, PRECISION, WIDEN)
    if SUMS:
        at = pid * tl.num_programs(0) + block
        tl.store(PART + 2 * at, value)
        tl.store(PART + 2 * at + 1, target)
    if GRADIENT:
        columns = tl.arange(0, BLOCK_S)
        written = own_inside[:, None] & (columns[None, :] < WIDTH_S)
        D_OWN += b * d_b + h * d_h + start * d_l
        tl.store(
            D_OWN + own[:, None].to(tl.int64) * d_l + columns[None, :],
            gradient.to(D_OWN.dtype.element_ty),
            mask=written,
        )


def launch(
    inputs: Attention, *, tinybert: bool, gradient: bool, one_program: int = ONE_PROGRAM
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns (2,) float32 sums over all scores (in the window) of D^2 and (A_t / scale_s)^2, D = (A_s - A_t) /
    scale_s, and [D K_s, D^T Q_s] if `gradient`, in the inputs' bfloat16 or in float32."""
    inputs, layout = contiguous_rows(inputs), Layout.from_inputs(inputs)
    q_s, k_s, q_t, k_t, *scales = inputs[:6]
    masked, window, width_t = layout.mask is not None, inputs.window, q_t.shape[-1]
    grads = empty_gradients([q_s, k_s]) if gradient else []
    d_q, d_k = grads if gradient else (q_s, k_s)
    shared = {
        "TINYBERT": tinybert,
        "CUT": ZEROED_SCORE_TINYBERT,
        "WINDOWED": window is not None,
        "GRADIENT": gradient,
        "num_warps": WARPS,
        **widths(inputs),
        **constants(inputs),
    }
    maps = len(layout.starts) * q_s.shape[1]
    if tinybert and width_t > 64:  # needs both sides' scores at once, and they do not fit
        one_program = 0
    if layout.longest <= one_program:
        block = max(16, triton.next_power_of_2(layout.longest))
        part = torch.empty(maps, 2, dtype=torch.float32, device=q_s.device)
        _whole[(maps,)](
            q_s, k_s, q_t, k_t, d_q, d_k, *layout.tensors(), part, *scales, window or 0,
            *layout.strides(q_s, k_s, q_t, k_t, d_q, d_k), layout.mask_stride,
            BLOCK_L=block, BN=min(block, columns_of(width_t)), MASKED=masked, num_stages=1, **shared,
        )  # fmt: skip
        return part.sum(0), grads
    blocks = triton.cdiv(layout.longest, ROWS)
    part = torch.empty(maps * blocks, 2, dtype=torch.float32, device=q_s.device)
    sides = [(q_s, k_s, q_t, k_t, d_q), (k_s, q_s, k_t, q_t, d_k)]
    for by_query, side in zip((True, False) if gradient else (True,), sides, strict=False):
        _by_rows[(blocks, maps)](
            *side, *layout.tensors(), part, *scales, window or 0, *layout.strides(*side), layout.mask_stride,
            BM=ROWS, BN=columns_of(width_t), SUMS=by_query, num_stages=STAGES,
            OWN_MASKED=masked and not (tinybert and by_query),
            OTHER_MASKED=masked and not (tinybert and not by_query), **shared,
        )  # fmt: skip
    return part.sum(0), grads


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
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sums, grads = launch(inputs, tinybert=tinybert, gradient=wanted)
        factor = factor * inputs.scale_s * inputs.scale_s
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.factor, ctx.dtypes = 2.0 * factor, (q_s.dtype, k_s.dtype)
        value, target = (sums * factor).unbind()
        ctx.mark_non_differentiable(target)
        return value, target


def score_mse(inputs: Attention, *, factor: float, tinybert: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what attention_tile.score_mse does; all tensors of one dtype (float32, bfloat16, float16), in padded or
    packed sequences."""
    assert inputs.q_s.dtype in DTYPES, inputs.q_s.dtype
    value, target = _ScoreMSE.apply(inputs.q_s, inputs.k_s, inputs, factor, tinybert)
    return value, target
