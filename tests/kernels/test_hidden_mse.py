"""The hidden-state MSE in few passes against the float64 reference: value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import hidden_mse as kernel
from engine.kernels import reference
from engine.kernels.hidden_mse import hidden_mse

UPSTREAM = 0.37


def case(B: int, L: int, D: int, *, masked: bool):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(B, L, D, generator=g), torch.randn(B, L, D, generator=g)
    mask = None
    if masked:
        mask = torch.arange(L) < torch.randint(1, L + 1, (B,), generator=g)[:, None]
        student[~mask] = teacher[~mask] = math.nan
    return student, teacher, mask, float(B * L if mask is None else mask.sum())


def value_and_gradient(function, student, teacher, mask, tokens, dtype):
    student = student.to(dtype, copy=True).requires_grad_()
    value = function(student, teacher.to(dtype), mask, tokens)
    (value * UPSTREAM).backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("B", "L", "D"), [(1, 1, 1), (3, 63, 26), (5, 40, 96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("at_once", [1, 2**13, 2**18])
def test_value_and_gradient_equal_the_reference(B, L, D, masked, dtype, tolerance, at_once, monkeypatch) -> None:
    monkeypatch.setitem(kernel.ENTRIES_AT_ONCE, "cpu", at_once)
    given = case(B, L, D, masked=masked)
    want = value_and_gradient(reference.hidden_mse, *given, torch.float64)
    got = value_and_gradient(hidden_mse, *given, dtype)
    for w, g in zip(want, got, strict=True):
        assert g.dtype == dtype
        assert (w - g).abs().max() <= tolerance * w.abs().max()


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_sixteen_bit_inputs_are_widened_before_they_are_subtracted(noise: float) -> None:
    student, teacher, mask, tokens = case(4, 32, 48, masked=True)
    student = (teacher + noise * torch.randn(teacher.shape)).bfloat16()
    want = value_and_gradient(reference.hidden_mse, student, teacher.bfloat16(), mask, tokens, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(hidden_mse, student, teacher.bfloat16(), mask, tokens, torch.bfloat16)
    assert got[0].dtype == torch.float32
    assert abs(want[0] - got[0]) <= 1e-5 * want[0]
    assert (want[1] - got[1]).abs().max() <= 2**-8 * want[1].abs().max()


def test_nothing_but_the_difference_is_kept_for_the_backward_pass() -> None:
    student, teacher, _, tokens = case(2, 8, 16, masked=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden_mse(student.bfloat16().requires_grad_(), teacher.bfloat16(), None, tokens)
    assert [tuple(t.shape) for t in kept] == [(2, 8, 16)]


def test_a_gradient_of_a_loss_scaled_to_fp16_does_not_vanish() -> None:
    """Only the scaled gradient may be rounded to fp16: 1e-9 alone would become 0 there."""
    student = torch.full((1, 1, 8), 1e-3, dtype=torch.float16, requires_grad=True)
    (hidden_mse(student, torch.zeros(1, 1, 8), None, 1e5) * 65536.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad.float(), torch.tensor(2e-3 / 8e5 * 65536.0), rtol=1e-2)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden states"):
        hidden_mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), None, 2.0)
    with pytest.raises(ValueError, match="positive count"):
        hidden_mse(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), None, 0.0)
