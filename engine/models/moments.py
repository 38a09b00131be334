"""Sums over tokens from which a linear map between two layers is fitted and judged; the states themselves are not
kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

RIDGE = 1e-3
"""Share of the mean squared state that is added to each diagonal entry of the normal equations."""


@dataclass(frozen=True)
class Moments:
    """Sums over states X (n, D_s) and targets Y (n, D_t) at the same n tokens; all float64, on the CPU."""

    tokens: int
    x: torch.Tensor
    """(D_s,) sum of X"""
    y: torch.Tensor
    """(D_t,) sum of Y"""
    xx: torch.Tensor
    """(D_s, D_s) X^T X"""
    xy: torch.Tensor
    """(D_s, D_t) X^T Y"""
    yy: torch.Tensor
    """(D_t,) sum of the squares of Y"""

    @classmethod
    def from_states(cls, states: torch.Tensor, targets: torch.Tensor) -> Moments:
        """Sums up states (n, D_s) and targets (n, D_t), of any dtype and device."""
        x, y = (tensor.detach().to("cpu", torch.float64) for tensor in (states, targets))
        return cls(len(x), x.sum(0), y.sum(0), x.t() @ x, x.t() @ y, y.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.tokens + other.tokens,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def select_targets(self, columns: slice) -> Moments:
        """Returns those of the same states and of these columns of Y alone."""
        return replace(self, y=self.y[columns], xy=self.xy[:, columns], yy=self.yy[columns])

    @property
    def variance(self) -> float:
        """Variance of Y about its mean, averaged over its dimensions."""
        n = self.tokens
        return (float(self.yy.sum()) / n - float((self.y / n).square().sum())) / len(self.y)

    def mse(self, fitted: LinearMap) -> float:
        """Returns the mean over tokens and dimensions of (W x + b - y)^2."""
        weight, n = fitted.weight, self.tokens
        bias = torch.zeros_like(self.y) if fitted.bias is None else fitted.bias
        squares = float(((weight @ self.xx) * weight).sum()) + float(self.yy.sum()) + n * float(bias.square().sum())
        products = -float((weight * self.xy.t()).sum()) + float(bias @ (weight @ self.x)) - float(bias @ self.y)
        return (squares + 2.0 * products) / (n * len(self.y))

    def explained(self, fitted: LinearMap) -> float:
        """Returns R^2: the share of the targets' variance that the map explains (negative where the mean is better)."""
        return 1.0 - self.mse(fitted) / self.variance


@dataclass(frozen=True)
class LinearMap:
    """A linear map y = W x + b."""

    weight: torch.Tensor
    """(D_t, D_s) float64"""
    bias: torch.Tensor | None
    """(D_t,) float64"""

    def select_targets(self, rows: slice) -> LinearMap:
        """Returns what it says of these dimensions of y alone."""
        return LinearMap(self.weight[rows], None if self.bias is None else self.bias[rows])


def fit(pairs: Sequence[Moments], weights: Sequence[float], *, bias: bool) -> LinearMap:
    """Returns the one map that minimises sum_p weight_p * MSE_p + lambda |W|^2 (ridge regression, Hoerl and Kennard
    1970), by the normal equations in float64. lambda is relative to the states (RIDGE); a bias is not held back."""
    width = len(pairs[0].x)
    shares = [weight / pair.tokens for pair, weight in zip(pairs, weights, strict=True)]
    xx = sum((share * pair.xx for pair, share in zip(pairs, shares, strict=True)), torch.zeros(()))
    xy = sum((share * pair.xy for pair, share in zip(pairs, shares, strict=True)), torch.zeros(()))
    ridge = RIDGE * xx.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    if not bias:
        return LinearMap(torch.linalg.solve(xx + ridge, xy).t().contiguous(), None)
    x = sum((share * pair.x for pair, share in zip(pairs, shares, strict=True)), torch.zeros(()))
    y = sum((share * pair.y for pair, share in zip(pairs, shares, strict=True)), torch.zeros(()))
    total = sum(weights)
    centred = xx - torch.outer(x, x) / total + ridge
    weight = torch.linalg.solve(centred, xy - torch.outer(x, y) / total).t().contiguous()
    return LinearMap(weight, (y - weight @ x) / total)
