"""The one-pass attention-score MSE against the float64 reference: value and both gradients."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import reference
from engine.kernels.attention_score import attention_score_mse

UPSTREAM = 0.37


def case(B: int, H: int, H_k: int, L: int, d_s: int, d_t: int, *, masked: bool, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    q_s, q_t = torch.randn(B, H, L, d_s, generator=g), torch.randn(B, H, L, d_t, generator=g)
    k_s, k_t = torch.randn(B, H_k, L, d_s, generator=g), torch.randn(B, H, L, d_t, generator=g)
    mask = None
    if masked:
        lengths = torch.randint(1, L + 1, (B,), generator=g)
        mask = torch.arange(L) < lengths[:, None]
        for tensor in (q_s, k_s, q_t, k_t):
            tensor.transpose(1, 2)[~mask] = math.nan
    pairs = float(B * L * L if mask is None else mask.sum(1).square().sum())
    return (q_s, k_s, q_t, k_t), mask, pairs


def value_and_gradients(function, tensors, mask, pairs, dtype):
    q_s, k_s, q_t, k_t = (t.to(dtype, copy=True) for t in tensors)
    q_s.requires_grad_(), k_s.requires_grad_()
    scales = {"scale_s": q_s.shape[-1] ** -0.5, "scale_t": q_t.shape[-1] ** -0.5}
    value = function(q_s, k_s, q_t, k_t, **scales, mask=mask, token_pairs=pairs)
    (value * UPSTREAM).backward()
    return value.detach(), q_s.grad, k_s.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "H_k", "L", "d_s", "d_t"), [(1, 1, 1, 1, 8, 8), (3, 4, 4, 63, 26, 60), (2, 6, 2, 40, 16, 32)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_value_and_gradients_equal_the_reference(B, H, H_k, L, d_s, d_t, masked, dtype, tolerance) -> None:
    tensors, mask, pairs = case(B, H, H_k, L, d_s, d_t, masked=masked)
    want = value_and_gradients(reference.attention_score_mse, tensors, mask, pairs, torch.float64)
    got = value_and_gradients(attention_score_mse, tensors, mask, pairs, dtype)
    for name, w, g in zip(("value", "d query", "d key"), want, got, strict=True):
        assert g.dtype == dtype
        assert (w - g).abs().max() <= tolerance * w.abs().max(), name


def test_sixteen_bit_inputs_are_widened_before_any_product() -> None:
    tensors, mask, pairs = case(2, 3, 3, 17, 8, 8, masked=True)
    tensors = tuple(t.bfloat16() for t in tensors)
    want = value_and_gradients(reference.attention_score_mse, tensors, mask, pairs, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(attention_score_mse, tensors, mask, pairs, torch.bfloat16)
    assert got[0].dtype == torch.float32
    assert abs(want[0] - got[0]) <= 1e-5 * want[0]
    for w, g in zip(want[1:], got[1:], strict=True):
        assert (w - g).abs().max() <= 2**-8 * w.abs().max()  # the gradient itself is rounded to bf16


@pytest.mark.parametrize(("noise", "tolerance"), [(1e-1, 1e-4), (1e-2, 1e-3), (1e-3, 1e-2)])
def test_accuracy_near_convergence(noise: float, tolerance: float) -> None:
    """Where the two maps nearly agree their difference is small against them, and rounding counts most."""
    (_, _, q_t, k_t), mask, pairs = case(2, 4, 4, 64, 32, 32, masked=True, seed=3)
    g = torch.Generator().manual_seed(9)
    q_s, k_s = (t + noise * torch.randn(t.shape, generator=g) for t in (q_t, k_t))
    want = value_and_gradients(reference.attention_score_mse, (q_s, k_s, q_t, k_t), mask, pairs, torch.float64)
    got = value_and_gradients(attention_score_mse, (q_s, k_s, q_t, k_t), mask, pairs, torch.float32)
    assert abs(want[0] - got[0]) <= tolerance * want[0]
    assert (want[1] - got[1]).abs().max() <= tolerance * want[1].abs().max()


def test_no_gradient_work_without_a_graph_and_the_same_bits_twice() -> None:
    tensors, mask, pairs = case(2, 4, 4, 33, 16, 16, masked=True)
    first = value_and_gradients(attention_score_mse, tensors, mask, pairs, torch.float32)
    again = value_and_gradients(attention_score_mse, tensors, mask, pairs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    q_s, k_s, q_t, k_t = tensors
    alone = attention_score_mse(q_s, k_s, q_t, k_t, scale_s=0.25, scale_t=0.25, mask=mask, token_pairs=pairs)
    assert not alone.requires_grad
    assert torch.equal(alone, first[0])


def test_a_count_of_zero_is_refused() -> None:
    tensors, _, _ = case(1, 2, 2, 4, 8, 8, masked=False)
    with pytest.raises(ValueError, match="positive count"):
        attention_score_mse(*tensors, scale_s=1.0, scale_t=1.0, mask=None, token_pairs=0.0)
