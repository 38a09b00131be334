"""What each gene is worth: a linear model of the fitness of genomes, fitted to those that were evaluated.

    fitness = mean + main effect of each gene's value + effect of each pair of genes' values + noise

The effects of a gene sum to 0 over its values, those of a pair over the values of either gene: a main effect is the
difference to an average value when all other genes are averaged over (the functional analysis of variance).

Bayesian linear regression with its conjugate prior (Gelman et al., Bayesian Data Analysis, 3rd edition, chapter 14):
effects are normal, all main effects of one variance, all pair effects of a smaller one, the mean is flat, the variance
of the noise is 1 / variance. Teacher layers at distance d have effects of correlation smoothness ** d before any
evaluation; a value that names none (SKIP) is like no other. The prior's three numbers are those of the largest marginal
likelihood on a grid. It is computed over evaluations, not over effects, of which there are many more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from ga.evolution.genome import Genes

Array = npt.NDArray[np.float64]

FEWEST = 8
"""Number of evaluations below which nothing is fitted."""
MOST = 1000
"""Number of evaluations that are fitted; of more of them some between the best and the worst are left out."""
LEVEL = 0.95
"""Probability of an interval."""

SMOOTHNESS = (0.0, 0.5, 0.8, 0.95)
PAIR_SHARES = (0.0, 0.05, 0.2, 0.6)
SIGNALS = tuple(10 ** (power / 4) for power in range(-12, 9))


class Prior(NamedTuple):
    smoothness: float
    """Correlation of the effects of neighbouring teacher layers."""
    pair_share: float
    """Variance of a pair effect over that of a main effect."""
    signal: float
    """Variance of a main effect over that of the noise."""


@dataclass(frozen=True)
class Estimate:
    """An effect, in units of what was fitted, with the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside the interval."""
        return not self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class PairEffect:
    """What two values are worth together, beyond their main effects."""

    genes: tuple[int, int]
    """Places of the genes, from 0."""
    values: tuple[int, int]
    estimate: Estimate


class EffectsModel:
    """The fitted model."""

    def __init__(self, genomes: Sequence[Genes], fitness: Sequence[float], choices: Sequence[Genes]) -> None:
        """Fits the model. choices: the values of each gene. The order of evaluations does not matter. There must be
        FEWEST or more."""
        assert len(genomes) >= FEWEST
        order = sorted(range(len(genomes)), key=lambda i: (fitness[i], genomes[i]))
        order = [order[i] for i in np.linspace(0, len(order) - 1, min(len(order), MOST)).round().astype(int)]
        self.choices = tuple(choices)
        self.evaluations = len(order)
        """Number of evaluations that were fitted."""
        self._genes = self._places([genomes[i] for i in order])
        values = np.array([fitness[i] for i in order], np.float64)
        self._offset = float(np.median(values))  # equal values are 0 from here on, to the last bit
        self._fitness = values - self._offset
        self.prior = max(self._priors(), key=lambda one: one[0])[1]
        self._correlations = _correlations(self.choices, self.prior.smoothness)
        covariance = np.eye(self.evaluations) + self._covariance(self._genes, self._genes)
        inverse = np.linalg.inv(covariance)
        of_mean = inverse.sum(0)
        self._inverse, self._of_mean = inverse, of_mean
        self._projected = inverse - np.outer(of_mean, of_mean) / of_mean.sum()
        self._mean = float(of_mean @ self._fitness / of_mean.sum())
        self._weights = self._projected @ self._fitness
        self._freedom = self.evaluations - 1
        self._noise = max(0.0, float(self._fitness @ self._weights)) / self._freedom

    def _places(self, genomes: Sequence[Genes]) -> npt.NDArray[np.intp]:
        """Returns (genomes, genes): the place of each value among its choices."""
        columns = zip(*genomes, strict=True)
        return np.array(
            [[values.index(g) for g in column] for column, values in zip(columns, self.choices, strict=True)]
        ).T

    def _priors(self) -> list[tuple[float, Prior]]:
        """Returns the log of the marginal likelihood (up to a constant) of each prior of the grid."""
        centred = self._fitness - self._fitness.mean()
        found = []
        for smoothness in SMOOTHNESS:
            main, pairs = _kernels(_correlations(self.choices, smoothness), self._genes, self._genes)
            for share in PAIR_SHARES:
                kernel = main + share * pairs
                kernel = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
                sizes, directions = np.linalg.eigh(kernel)
                squares, sizes = (centred @ directions) ** 2, np.maximum(sizes, 0.0)
                for signal in SIGNALS:
                    scale = 1.0 + signal * sizes
                    rest = max(float((squares / scale).sum()), np.finfo(np.float64).tiny)
                    likelihood = -0.5 * float(np.log(scale).sum()) - 0.5 * (len(centred) - 1) * np.log(rest)
                    found.append((float(likelihood), Prior(smoothness, share, signal)))
        return found

    def _covariance(self, a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> Array:
        main, pairs = _kernels(self._correlations, a, b)
        return self.prior.signal * (main + self.prior.pair_share * pairs)

    def predict(self, genomes: Sequence[Genes]) -> tuple[Array, Array]:
        """Returns the mean and the standard deviation of the noise-free fitness of each genome."""
        genes = self._places(genomes)
        with_data = self._covariance(genes, self._genes)
        own = np.array([self._covariance(one[None], one[None])[0, 0] for one in genes])
        open_mean = (1.0 - with_data @ self._of_mean) ** 2 / self._of_mean.sum()
        variance = own - np.einsum("ij,jk,ik->i", with_data, self._inverse, with_data) + open_mean
        return self._offset + self._mean + with_data @ self._weights, np.sqrt(self._noise * np.maximum(variance, 0.0))

    def main_effects(self) -> list[dict[int, Estimate]]:
        """Returns the effect of each value of each gene."""
        found = []
        for gene, values in enumerate(self.choices):
            own = self._correlations[gene]
            estimates = self._estimates(
                self.prior.signal * own[:, self._genes[:, gene]], self.prior.signal * own.diagonal()
            )
            found.append(dict(zip(values, estimates, strict=True)))
        return found

    def pair_effects(self) -> list[PairEffect]:
        """Returns the effect of each pair of values of each pair of genes, the largest first."""
        signal = self.prior.signal * self.prior.pair_share
        found = []
        for a, b in combinations(range(len(self.choices)), 2):
            first, second = self._correlations[a], self._correlations[b]
            of_data = first[:, None, self._genes[:, a]] * second[None, :, self._genes[:, b]]
            own = np.outer(first.diagonal(), second.diagonal()).ravel()
            estimates = self._estimates(signal * of_data.reshape(len(own), -1), signal * own)
            values = [(g, h) for g in self.choices[a] for h in self.choices[b]]
            found += [PairEffect((a, b), both, one) for both, one in zip(values, estimates, strict=True)]
        return sorted(found, key=lambda one: -abs(one.estimate.mean))

    def _estimates(self, with_data: Array, own: Array) -> list[Estimate]:
        """Returns the posterior of effects. with_data: (effects, evaluations) prior covariance; own: prior variance;
        both over the variance of the noise."""
        means = with_data @ self._weights
        variance = own - np.einsum("ij,jk,ik->i", with_data, self._projected, with_data)
        half = float(stdtrit(self._freedom, 0.5 + LEVEL / 2)) * np.sqrt(self._noise * np.maximum(variance, 0.0))
        return [Estimate(float(m), float(m - h), float(m + h)) for m, h in zip(means, half, strict=True)]

    def left_out_correlation(self) -> float:
        """Returns Pearson's coefficient between the fitness of evaluations and what the model says of each when it is
        left out, with the same prior; 0 where either does not vary."""
        predicted = self._fitness - self._weights / self._projected.diagonal()
        if min(np.ptp(predicted), np.ptp(self._fitness)) <= 1e-9 * np.ptp(self._fitness):
            return 0.0
        return float(np.corrcoef(predicted, self._fitness)[0, 1])


def _correlations(choices: Sequence[Genes], smoothness: float) -> list[Array]:
    """Returns for each gene the (values, values) prior covariance of its effects, which sum to 0; mean variance 1."""
    found = []
    for values in choices:
        layers = np.array(values)
        raw = smoothness ** np.abs(layers[:, None] - layers).astype(np.float64)
        for i in np.flatnonzero(layers < 1):
            raw[i] = raw[:, i] = 0.0
            raw[i, i] = 1.0
        raw = raw - raw.mean(0) - raw.mean(1)[:, None] + raw.mean()
        found.append(raw / (raw.diagonal().mean() or 1.0))
    return found


def _kernels(correlations: Sequence[Array], a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Returns (len(a), len(b)): the prior covariance of genomes by main effects, and by pair effects."""
    main, squares = np.zeros((2, len(a), len(b)))
    for gene, correlation in enumerate(correlations):
        shared = correlation[np.ix_(a[:, gene], b[:, gene])]
        main += shared
        squares += shared**2
    return main, (main**2 - squares) / 2  # the sum over pairs of genes of their products
