"""Hidden-state MSE without a projection as one Triton launch over all pairs: each tensor is read once, each gradient
written once. Formulas: engine/kernels/hidden_mse.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from engine.kernels.exact import scaled
from engine.kernels.inputs import HiddenPairs
from engine.kernels.triton.common import DTYPES, FUSED, STAGES

BLOCK, BLOCKS_EACH = 1024, 4
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _squares(
    STATES, TARGETS, GRADIENTS, MASK, PART, elements, blocks,
    WIDTH: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, G_TYPE: tl.constexpr, MASKED: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_EACH: tl.constexpr,
):  # fmt: skip
    """Writes, as program (block, pair), PART[pair, block] = sum of squares and GRADIENTS[pair] = the difference."""
    block, pair = tl.program_id(0), tl.program_id(1)
    # The hint of alignment must come after the cast to a pointer; before it every access is two bytes wide.
    state = tl.multiple_of(tl.load(STATES + pair).to(tl.pointer_type(S_TYPE)), 16)
    target = tl.multiple_of(tl.load(TARGETS + pair).to(tl.pointer_type(T_TYPE)), 16)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = block.to(tl.int64) * (BLOCK * BLOCKS_EACH)
    for i in range(BLOCKS_EACH):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        real = inside
        if MASKED:
            real = inside & (tl.load(MASK + at // WIDTH, mask=inside, other=0) != 0)
        x = tl.load(state + at, mask=real, other=0.0).to(tl.float32)
        y = tl.load(target + at, mask=real, other=0.0).to(tl.float32)
        difference = x - y
        total += difference * difference
        if GRADIENT:
            gradient = tl.multiple_of(tl.load(GRADIENTS + pair).to(tl.pointer_type(G_TYPE)), 16)
            tl.store(gradient + at, difference.to(G_TYPE), mask=inside)
    tl.store(PART + pair * blocks + block, tl.sum(total, axis=0))


class _MSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: HiddenPairs, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, mask, coefficients = inputs.factor(), inputs.mask, inputs.coefficients
        wanted = any(ctx.needs_input_grad[1:])
        states, targets = (tuple(_aligned(x) for x in side) for side in (states, inputs.targets))
        first, device = states[0], states[0].device
        grads = [torch.empty_like(state) for state in states] if wanted else []
        blocks = triton.cdiv(first.numel(), BLOCK * BLOCKS_EACH)
        part = torch.empty(len(states), blocks, dtype=torch.float32, device=device)

        def table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64).to(device, non_blocking=True)

        _squares[(blocks, len(states))](
            table(states),
            table(targets),
            table(grads) if wanted else part,
            part if mask is None else mask.contiguous().view(torch.uint8),
            part,
            first.numel(),
            blocks,
            WIDTH=first.shape[-1],
            S_TYPE=_TL[first.dtype],
            T_TYPE=_TL[targets[0].dtype],
            G_TYPE=_TL[first.dtype],
            MASKED=mask is not None,
            GRADIENT=wanted,
            BLOCK=BLOCK,
            BLOCKS_EACH=BLOCKS_EACH,
            num_stages=STAGES,
            **FUSED,
        )
        ctx.save_for_backward(*grads)
        ctx.scales = [2.0 * factor * coefficient for coefficient in coefficients]
        each = part.sum(1) * factor
        total = sum(value * coefficient for value, coefficient in zip(each.unbind(), coefficients, strict=True))
        ctx.mark_non_differentiable(each)
        return total, each  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.scales, strict=True)
        return None, *(scaled(g, upstream * scale, g.dtype) for g, scale in grads)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Returns x, contiguous, from an address that 16 divides."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def hidden_mse(inputs: HiddenPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what hidden_mse.hidden_mse does without a projection; all states of one dtype and shape, all targets
    too."""
    assert inputs.states[0].dtype in DTYPES, inputs.states[0].dtype
    assert inputs.targets[0].dtype in DTYPES, inputs.targets[0].dtype
    total, each = _MSE.apply(inputs, *inputs.states)
    return total, each
