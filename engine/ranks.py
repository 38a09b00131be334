"""Ranks with ties, and Spearman's correlation of named values. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def mean_ranks(values: npt.NDArray[np.floating]) -> Floats:
    """(n,) -> (n,) ranks from 1 for the smallest; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Spearman's coefficient over the keys that both have; equal values get their mean rank. None for fewer than three
    such keys, or where one side is constant over them."""
    common = sorted(a.keys() & b.keys())
    if len(common) < 3:
        return None
    ranks = [mean_ranks(np.array([side[key] for key in common], np.float64)) for side in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    x, y = (rank - rank.mean() for rank in ranks)
    return float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))
