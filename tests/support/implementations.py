"""The implementations of each kernel under one call, and the cases that all of them must pass.

Without a GPU Triton's are run by its interpreter on CPU tensors. The variable that asks for it is read when Triton and
the kernels are imported, so it is set for these times only, and other tests' processes do not inherit it. With a GPU
they are compiled for it, and test_on_gpu.py is their test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from interpreter import interpreted

from engine.kernels import attention_gram, attention_tile, softmax_kl
from engine.kernels.inputs import Attention, Rows
from engine.kernels.segments import Segments

triton_attention = triton_hidden = triton_kl = None
if not torch.cuda.is_available():
    with interpreted(), suppress(ImportError):
        from engine.kernels.triton import attention as triton_attention  # type: ignore[no-redef]
        from engine.kernels.triton import hidden as triton_hidden  # type: ignore[no-redef] # noqa: F401
        from engine.kernels.triton import kl as triton_kl  # type: ignore[no-redef]

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
UPSTREAM = 0.37
needs_triton = pytest.mark.skipif(
    triton_attention is None, reason="Triton is not installed (pip install triton), or there is a GPU: test_on_gpu.py"
)

ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of gradients, as a share of the largest; the interpreter's casts to bfloat16 truncate, and gradients are rounded
twice there."""


def gram64(inputs: Attention, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_gram.score_mse(inputs, **settings, accumulate=torch.float64)


def triton_by_rows(inputs: Attention, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As for sequences that are too long for one program."""
    defaults = triton_attention.launch.__kwdefaults__
    defaults["one_program"] = 8
    try:
        return triton_attention.score_mse(inputs, **settings)
    finally:
        defaults["one_program"] = triton_attention.ONE_PROGRAM


SCORES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "tile": attention_tile.score_mse,
    "gram": attention_gram.score_mse,
    "gram, float64 sums": gram64,
}
SOFTMAX_KL: dict[str, Callable[..., torch.Tensor]] = {"torch": softmax_kl.softmax_kl}
if triton_attention is not None:
    SCORES |= {"triton, whole": triton_attention.score_mse, "triton, by rows": triton_by_rows}
    SOFTMAX_KL["triton"] = triton_kl.softmax_kl


@dataclass(frozen=True)
class Case:
    tensors: Tensors
    mask: torch.Tensor | None
    scale_s: float
    scale_t: float

    def inputs(self, tensors: Tensors, **windows: int | None) -> Attention:
        """Returns these tensors in the place of its own."""
        return Attention(*tensors, self.scale_s, self.scale_t, **windows, rows=Rows(self.mask))

    @property
    def heads(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def tokens(self) -> float:
        B, _, L, _ = self.tensors[0].shape
        return float(B * L if self.mask is None else self.mask.sum())

    @property
    def pairs(self) -> float:
        B, _, L, _ = self.tensors[0].shape
        return float(B * L * L if self.mask is None else self.mask.sum(1).square().sum())


def make_case(
    B: int,
    H: int,
    L: int,
    d_s: int,
    d_t: int,
    *,
    masked: bool,
    noise: float | None = None,
    poisoned: bool = True,
    empty: bool = False,
    seed: int = 0,
) -> Case:
    """noise: the student is the teacher plus noise (equal widths). poisoned: NaN in the padding. empty: the last
    sequence is padding only. Tensors are laid out as models give them, tokens before heads."""
    make = torch.Generator().manual_seed(seed)

    def draw(width: int) -> torch.Tensor:
        return torch.randn(B, L, H, width, generator=make).transpose(1, 2)

    q_t, k_t = draw(d_t), draw(d_t)
    q_s, k_s = draw(d_s), draw(d_s)
    if noise is not None:
        q_s, k_s = q_t + noise * q_s, k_t + noise * k_s
    mask = None
    if masked:
        lengths = torch.randint(1, L + 1, (B,), generator=make)
        if empty:
            lengths[-1] = 0
        mask = torch.arange(L) < lengths[:, None]
        if poisoned:
            for tensor in (q_s, k_s, q_t, k_t):
                tensor.transpose(1, 2)[~mask] = math.nan
    return Case((q_s, k_s, q_t, k_t), mask, d_s**-0.5, d_t**-0.5)


def value_and_gradients(
    function: Callable[[Tensors], torch.Tensor], tensors: Tensors, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Of the student's two tensors, under an upstream gradient other than 1."""
    leaves = [x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(tensors)]
    value = function((leaves[0], leaves[1], leaves[2], leaves[3]))
    (value * UPSTREAM).backward()
    gradients = [leaf.grad for leaf in leaves[:2]]
    assert all(gradient is not None for gradient in gradients)
    return [value.detach(), *(g for g in gradients if g is not None)]


def assert_equal_to(
    wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], *, value: float, gradient: float
) -> None:
    """value: largest relative error; gradient: as a share of the largest entry."""
    assert abs(wanted[0] - got[0]) <= value * abs(wanted[0]), (wanted[0], got[0])
    for name, w, g in zip(("d query", "d key"), wanted[1:], got[1:], strict=True):
        worst = float((w.double() - g.double()).abs().max() / w.abs().max())
        assert worst <= gradient, f"{name}: {worst:.2e}"


def relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Returns that of the Frobenius norm."""
    return float((wanted.double() - got.double()).norm() / wanted.double().norm())


def packed(case: Case) -> tuple[Tensors, Segments]:
    """The same sequences without their padding."""
    assert case.mask is not None
    segments = Segments([int(n) for n in case.mask.sum(1)])
    q_s, k_s, q_t, k_t = (segments.packed(x, 2) for x in case.tensors)
    return (q_s, k_s, q_t, k_t), segments
