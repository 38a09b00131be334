"""Ranks with ties, Spearman's correlation, and the ratio of signal to seed noise. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDING = 1e-12
"""A standard deviation below this share of the largest fitness is rounding, not noise."""


@dataclass(frozen=True)
class Signal:
    """A one-way table: k mappings, n_i seeds each. Variances are of fitness, so in its unit squared."""

    ratio: float | None
    """between / within, as they are: about `chance` when the mapping does not matter at all. None: see note."""
    between: float
    """Variance of the k mapping means (divisor k - 1), which includes what is left of the seed noise in them."""
    within: float
    """Variance between the seeds of one mapping, pooled over mappings (divisor sum of n_i - 1)."""
    chance: float
    """What ratio is on average when only seeds differ: mean of 1 / n_i."""
    f_statistic: float | None
    """F of the one-way analysis of variance, with mappings - 1 and sum of (n_i - 1) degrees of freedom; about 1 when
    the mapping does not matter, and n * ratio when every mapping has n seeds. None with ratio."""
    paired_within: float | None
    """Variance of what is left when each seed's own effect, the same for every mapping, is taken out (divisor
    (k - 1) * (n - 1)): the noise of a comparison at equal seeds. None unless all mappings have the same seeds."""
    paired_ratio: float | None
    """between / paired_within. None with paired_within, or where that is 0."""
    mappings: int
    seeds: int
    """Fewest seeds of a mapping."""
    note: str
    """Why there is no ratio; empty when there is one."""


def signal_ratio(fitness: Mapping[str, Sequence[float] | Mapping[int, float]]) -> Signal | None:
    """Compares the variance between mappings with that between the seeds of one mapping.

    fitness: mapping -> its finite fitness, seed by seed: {seed: fitness}, or a sequence whose i-th value is the i-th
    seed's.

    The variance of the mapping means is not corrected for the seed noise in it (subtract chance * within for that): a
    search also ranks by means that hold this noise. Returns None for fewer than two mappings, or no mapping with two
    seeds.
    """
    table = {mapping: _by_seed(values) for mapping, values in fitness.items()}
    table = {mapping: values for mapping, values in table.items() if values}
    counts = np.array([len(values) for values in table.values()])
    if len(table) < 2 or counts.max() < 2:
        return None
    rows = [np.array([values[seed] for seed in sorted(values)], np.float64) for values in table.values()]
    every = np.concatenate(rows)
    assert np.isfinite(every).all(), fitness
    smallest = (ROUNDING * float(np.abs(every).max())) ** 2
    means = np.array([row.mean() for row in rows])
    between = _variance(float(np.square(means - means.mean()).sum()), len(rows) - 1, smallest)
    squares = sum(float(np.square(row - row.mean()).sum()) for row in rows)
    within = _variance(squares, int((counts - 1).sum()), smallest)
    weighted = float(np.dot(counts, np.square(means - every.mean()))) / (len(rows) - 1)
    paired_within = None
    if len({frozenset(values) for values in table.values()}) == 1:
        paired_within = _residual_variance(np.array(rows), smallest)
    return Signal(
        ratio=between / within if within else None,
        between=between,
        within=within,
        chance=float(np.mean(1 / counts)),
        f_statistic=weighted / within if within else None,
        paired_within=paired_within,
        paired_ratio=between / paired_within if paired_within else None,
        mappings=len(rows),
        seeds=int(counts.min()),
        note="" if within else "no seed noise at all: every mapping has the same fitness with each of its seeds",
    )


def describe(signal: Signal) -> str:
    """Returns two lines for the user: the figures, and what to do about them."""
    deviations = f"standard deviation {signal.between**0.5:.4f} between {signal.mappings} mappings"
    if signal.ratio is None:
        advice = "Repeats add nothing: proxy.repeats=1 is enough." if signal.between else "Raise proxy.steps."
        return f"signal ratio: none ({deviations}; {signal.note})\n  {advice}"
    figures = (
        f"signal ratio {signal.ratio:.2f} = variance between mappings / variance between seeds ({deviations}, "
        f"{signal.within**0.5:.4f} between seeds; {signal.chance:.2f} is chance; F {signal.f_statistic:.2f}"
    )
    if signal.paired_ratio is not None:
        figures += f"; {signal.paired_ratio:.2f} at equal seeds"
    if signal.ratio >= 1:
        meaning = "Mappings differ by more than seeds do."
    elif signal.paired_ratio is not None and signal.paired_ratio >= 1:
        meaning = "Seed noise hides the mappings unless they are compared at equal seeds: compare only those."
    else:
        meaning = "Seed noise hides the mappings: raise proxy.steps or proxy.repeats."
    return f"{figures})\n  {meaning}"


def _by_seed(values: Sequence[float] | Mapping[int, float]) -> dict[int, float]:
    return dict(values) if isinstance(values, Mapping) else dict(enumerate(values))


def _variance(squares: float, freedom: int, smallest: float) -> float:
    """Returns the mean square; 0.0 where only rounding is left of it."""
    variance = squares / freedom
    return variance if variance > smallest else 0.0


def _residual_variance(table: Floats, smallest: float) -> float:
    """Returns the variance of the residuals of a (k, n) table: the two-way layout without replication."""
    k, n = table.shape
    residuals = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return _variance(float(np.square(residuals).sum()), (k - 1) * (n - 1), smallest)


def mean_ranks(values: npt.NDArray[np.floating]) -> Floats:
    """Returns the (n,) ranks of (n,) values, from 1 for the smallest; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Returns Spearman's coefficient over the keys that both have; equal values get their mean rank. None for fewer
    than three such keys, or where one side is constant over them."""
    common = sorted(a.keys() & b.keys())
    if len(common) < 3:
        return None
    ranks = [mean_ranks(np.array([side[key] for key in common], np.float64)) for side in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    x, y = (rank - rank.mean() for rank in ranks)
    return float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))
