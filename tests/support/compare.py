"""Curves and weights of two runs."""

from __future__ import annotations

import torch


def relative_gap(a: list[float], b: list[float]) -> float:
    """The largest, as a share of `a`."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
