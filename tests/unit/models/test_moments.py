"""Linear maps that are fitted from sums over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from engine.models import moments as moments_module
from engine.models.moments import LinearMap, Moments, fit


def states(n: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 6) and (n, 4), the second a noisy affine map of the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x, x @ weight.t() + 1.0 + 0.3 * torch.randn(n, 4, generator=generator, dtype=torch.float64)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, y = states()
    whole = Moments.from_states(x, y)
    parts = Moments.from_states(x[:100], y[:100]) + Moments.from_states(x[100:], y[100:])
    assert parts.tokens == whole.tokens == 300
    for name in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert whole.variance == pytest.approx(float(y.var(0, correction=0).mean()))


@pytest.mark.parametrize("bias", [False, True])
def test_error_and_explained_share_are_those_of_the_states_themselves(bias: bool) -> None:
    x, y = states()
    found = fit([Moments.from_states(x, y)], [1.0], bias=bias)
    other_x, other_y = states(seed=1)
    other = Moments.from_states(other_x, other_y)
    predicted = other_x @ found.weight.t() + (0.0 if found.bias is None else found.bias)
    assert other.mse(found) == pytest.approx(float((predicted - other_y).square().mean()))
    share = r2_score(other_y.numpy(), predicted.numpy(), multioutput="variance_weighted")
    assert other.explained(found) == pytest.approx(share)
    assert other.explained(LinearMap(torch.zeros(4, 6, dtype=torch.float64), other_y.mean(0))) == pytest.approx(0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_the_map_is_that_of_scikit_learns_ridge(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "RIDGE", 0.1)
    x, y = states()
    found = fit([Moments.from_states(x, y)], [1.0], bias=bias)
    alpha = 0.1 * float(x.square().sum(0).mean())
    want = Ridge(alpha=alpha, fit_intercept=bias).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.weight.numpy(), want.coef_, rtol=1e-9)
    if bias:
        assert found.bias is not None
        np.testing.assert_allclose(found.bias.numpy(), want.intercept_, rtol=1e-9)


def test_a_shared_map_weighs_each_pair_by_its_weight_and_not_by_its_tokens() -> None:
    x, y = states()
    other_x, other_y = states(40, seed=2)
    pairs, weights = [Moments.from_states(x, y), Moments.from_states(other_x, 3.0 * other_y)], [2.0, 0.5]
    found = fit(pairs, weights, bias=False)

    def loss(weight: torch.Tensor) -> float:
        return sum(w * pair.mse(LinearMap(weight, None)) for w, pair in zip(weights, pairs, strict=True))

    best = loss(found.weight)
    for entry in range(24):
        step = torch.zeros(24, dtype=torch.float64)
        step[entry] = 0.05
        assert loss(found.weight + step.view(4, 6)) > best
        assert loss(found.weight - step.view(4, 6)) > best
