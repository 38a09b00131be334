"""Hidden-state MSE of several pairs through one projection, with all gradients: neither the projected states nor the
differences are ever stored.

For pair p, with R_p = S_p W^T + b - T_p over real tokens (W, b: none for equal widths) and f = 1 / (tokens * width of
T): value_p = f sum(R_p^2), and of the weighted sum, sum_p c_p value_p, the gradients are dS_p = 2 f c_p R_p W, dW =
sum_p 2 f c_p R_p^T S_p and db = sum_p 2 f c_p sum(R_p). Some tokens are worked on at a time; what is summed over tokens
and pairs is summed in float32, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from engine.kernels.exact import exact_products, product_over_rows, scaled, square_sum, widest
from engine.kernels.inputs import HiddenPairs

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 2**15}
"""Tokens that go through a projection together: smaller products are slower (1.8 times at 256 in bf16 on a CPU). CUDA:
48 MiB of difference for a teacher of width 768 in bf16, and few launches."""
ENTRIES_AT_ONCE = {"cpu": 2**18, "cuda": 2**28}
"""Entries that are subtracted together without one. CPU: 1 MiB in fp32, half of a core's cache. CUDA: no more than a
dot product takes."""


class _MSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        inputs: HiddenPairs,
        *states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        factor, targets, coefficients = inputs.factor(), inputs.targets, inputs.coefficients
        pads = None if inputs.mask is None else ~inputs.mask.flatten().unsqueeze(1)
        weight_wanted, bias_wanted, states_wanted = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            any(ctx.needs_input_grad[3:]),
        )
        kind = widest(*states, *targets)
        width_t = targets[0].shape[-1]
        device = states[0].device
        at_once = TOKENS_AT_ONCE[device.type], max(1, ENTRIES_AT_ONCE[device.type] // width_t)
        most = at_once[0] if weight is not None else at_once[1]
        d_weight = (
            torch.zeros(weight.shape, dtype=kind, device=device) if weight is not None and weight_wanted else None
        )
        d_bias = torch.zeros(width_t, dtype=kind, device=device) if bias_wanted else None
        values, d_states = [], []
        with exact_products(device):
            for state, target, coefficient in zip(states, targets, coefficients, strict=True):
                rows_s, rows_t = state.flatten(0, -2), target.flatten(0, -2)
                d_state = torch.empty_like(rows_s) if states_wanted else None
                sums = []
                for first in range(0, len(rows_s), most):
                    at = slice(first, first + most)
                    part, goal = rows_s[at], rows_t[at]
                    if weight is None:
                        kept = d_state[at] if d_state is not None and d_state.dtype == kind else None
                        residual = _difference(part, goal, kind, out=kept)
                    else:
                        part = part if pads is None else part.masked_fill(pads[at], 0.0)
                        residual = _residual(part, goal, weight, bias)
                    if pads is not None:
                        residual.masked_fill_(pads[at], 0.0)
                    sums.append(square_sum(residual, kind))
                    if d_state is not None and weight is not None:
                        d_state[at] = residual @ weight
                    elif d_state is not None and d_state.dtype != kind:
                        d_state[at] = residual
                    if d_weight is not None and weight is not None:
                        product = product_over_rows(residual, part.to(weight.dtype))
                        d_weight.add_(product, alpha=2.0 * factor * coefficient)
                    if d_bias is not None:
                        d_bias.add_(residual.sum(0, dtype=kind), alpha=2.0 * factor * coefficient)
                values.append(torch.stack(sums).sum() * factor)
                if d_state is not None:
                    d_states.append(d_state.view(state.shape))
        ctx.save_for_backward(d_weight, d_bias, *d_states)
        ctx.scales = [2.0 * factor * coefficient for coefficient in coefficients]
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias)]
        each = torch.stack(values)
        total = sum(value * coefficient for value, coefficient in zip(values, coefficients, strict=True))
        assert isinstance(total, torch.Tensor)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_weight, d_bias, *d_states = ctx.saved_tensors
        weight_and_bias = (
            None if gradient is None else scaled(gradient, upstream, dtype)
            for gradient, dtype in zip((d_weight, d_bias), ctx.dtypes, strict=True)
        )
        # Saved without their factors, which are small enough to vanish in float16.
        scales = zip(d_states, ctx.scales, strict=False)
        of_states: list[torch.Tensor | None] = [scaled(d, upstream * scale, d.dtype) for d, scale in scales]
        return *weight_and_bias, None, *(of_states or [None] * len(ctx.scales))


def _difference(
    state: torch.Tensor, target: torch.Tensor, kind: torch.dtype, *, out: torch.Tensor | None
) -> torch.Tensor:
    """Returns state - target in full precision, in its own memory or `out`."""
    if state.dtype == target.dtype == kind:
        return torch.sub(state, target, out=out)
    wide = state.to(kind, copy=True).sub_(target)
    return wide if out is None else out.copy_(wide)


def _residual(
    state: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns the residual (tokens, width of the target) in the weight's dtype."""
    # A 16-bit hidden state meets a float32 weight when only projections keep that. Products subtract in their float32
    # accumulators, so that 16 bits round the difference and not the two that it is of.
    state, target = state.to(weight.dtype), target.to(weight.dtype)
    if bias is not None:  # as one more feature, so that it too is added before anything is rounded
        state = torch.cat([state, state.new_ones(len(state), 1)], dim=1)
        weight = torch.cat([weight, bias.to(weight.dtype).unsqueeze(1)], dim=1)
    return torch.addmm(target, state, weight.t(), beta=-1.0)


def hidden_mse(inputs: HiddenPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weighted sum of reference.hidden_mse over the pairs, differentiable in states, weight and bias, and
    the values (pairs,) themselves, detached; both to rounding. Raises ValueError for pairs that cannot be compared."""
    total, each = _MSE.apply(inputs.weight, inputs.bias, inputs, *inputs.states)
    return total, each
