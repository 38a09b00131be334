"""What each gene is worth: a linear model of the fitness of genomes, fitted to those that were evaluated.

    fitness = mean + main effect of each gene's value + effect of each pair of genes' values + noise

The effects of a gene sum to 0 over its values, those of a pair over the values of either gene: a main effect is the
difference to an average value when all other genes are averaged over (the functional analysis of variance).

Bayesian linear regression with its conjugate prior (Gelman et al., Bayesian Data Analysis, 3rd edition, chapter 14):
effects are normal, all main effects of one variance, all pair effects of a smaller one, the mean is flat, the variance
of the noise is 1 / variance. Teacher layers at distance d have effects of correlation smoothness ** d before any
evaluation; a value that names none (SKIP) is like no other. What is said is the mean over a grid of priors, weighted by
their marginal likelihood: few evaluations do not tell the prior, and intervals have to know that. It is computed over
evaluations, not over effects, of which there are many more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from ga.evolution.genome import Genes

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

FEWEST = 8
"""Number of evaluations below which nothing is fitted."""
MOST = 500
"""Number of evaluations that are fitted; of more of them some between the best and the worst are left out."""
LEVEL = 0.95
"""Probability of an interval."""

SMOOTHNESS = (0.0, 0.5, 0.8, 0.95)
PAIR_SHARES = (0.0, 0.05, 0.2, 0.6)
SIGNALS = tuple(10 ** (power / 2) for power in range(-6, 5))
NEGLIGIBLE = 7.0
"""Distance to the largest log marginal likelihood from which on a prior is left out."""


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
    """The fitted model: the mean over priors, weighted by their marginal likelihood."""

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
        likelihoods = self._likelihoods()
        highest = max(likelihoods.values())
        likely = {prior: np.exp(one - highest) for prior, one in likelihoods.items() if one > highest - NEGLIGIBLE}
        total = sum(likely.values())
        self._fits = [
            (float(weight / total), _Fit(prior, self.choices, self._genes, self._fitness))
            for prior, weight in likely.items()
        ]

    def _places(self, genomes: Sequence[Genes]) -> Places:
        """Returns (genomes, genes): the place of each value among its choices."""
        columns = zip(*genomes, strict=True)
        return np.array(
            [[values.index(g) for g in column] for column, values in zip(columns, self.choices, strict=True)]
        ).T

    def _likelihoods(self) -> dict[Prior, float]:
        """Returns the log of the marginal likelihood (up to a constant) of each prior of the grid."""
        centred = self._fitness - self._fitness.mean()
        found = {}
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
                    found[Prior(smoothness, share, signal)] = float(likelihood)
        return found

    def _mixed(self, of_fit: Callable[[_Fit], tuple[Array, Array]]) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the mixture of what the fits say, (mean, variance) each."""
        means, squares = np.zeros(()), np.zeros(())
        for weight, fit in self._fits:
            mean, variance = of_fit(fit)
            means = means + weight * mean
            squares = squares + weight * (np.maximum(variance, 0.0) + mean**2)
        return means, np.sqrt(np.maximum(squares - means**2, 0.0))

    def _estimates(self, of_fit: Callable[[_Fit], tuple[Array, Array]]) -> list[Estimate]:
        means, deviations = self._mixed(of_fit)
        half = float(stdtrit(self.evaluations - 1, 0.5 + LEVEL / 2)) * deviations
        return [Estimate(float(m), float(m - h), float(m + h)) for m, h in zip(means, half, strict=True)]

    def predict(self, genomes: Sequence[Genes]) -> tuple[Array, Array]:
        """Returns the mean and the standard deviation of the noise-free fitness of each genome."""
        genes = self._places(genomes)
        mean, deviation = self._mixed(lambda fit: fit.predict(genes))
        return self._offset + mean, deviation

    @cached_property
    def main_effects(self) -> list[dict[int, Estimate]]:
        """The effect of each value of each gene."""
        return [
            dict(zip(values, self._estimates(partial(_Fit.main_effects, gene=gene)), strict=True))
            for gene, values in enumerate(self.choices)
        ]

    @cached_property
    def pair_effects(self) -> list[PairEffect]:
        """The effect of each pair of values of each pair of genes, the largest first."""
        found = []
        for a, b in combinations(range(len(self.choices)), 2):
            estimates = self._estimates(partial(_Fit.pair_effects, genes=(a, b)))
            values = product(self.choices[a], self.choices[b])
            found += [PairEffect((a, b), both, one) for both, one in zip(values, estimates, strict=True)]
        return sorted(found, key=lambda one: -abs(one.estimate.mean))

    def left_out_correlation(self) -> float:
        """Returns Pearson's coefficient between the fitness of evaluations and what the model says of each when it is
        left out, with the same weights of priors; 0 where either does not vary."""
        predicted, _ = self._mixed(lambda fit: (fit.left_out(), np.zeros(self.evaluations)))
        if min(np.ptp(predicted), np.ptp(self._fitness)) <= 1e-9 * np.ptp(self._fitness):
            return 0.0
        return float(np.corrcoef(predicted, self._fitness)[0, 1])


class _Fit:
    """The posterior under one prior."""

    def __init__(self, prior: Prior, choices: Sequence[Genes], genes: Places, fitness: Array) -> None:
        self._prior, self._genes, self._fitness = prior, genes, fitness
        self._correlations = _correlations(choices, prior.smoothness)
        self._inverse = np.linalg.inv(np.eye(len(fitness)) + self._covariance(genes))
        self._of_mean = self._inverse.sum(0)
        self._projected = self._inverse - np.outer(self._of_mean, self._of_mean) / self._of_mean.sum()
        """Inverse with the mean projected out."""
        self._mean = float(self._of_mean @ fitness / self._of_mean.sum())
        self._weights = self._projected @ fitness
        self._noise = max(0.0, float(fitness @ self._weights)) / (len(fitness) - 1)
        """Variance of the noise."""

    def _covariance(self, genes: Places) -> Array:
        """Returns the prior covariance of genomes with the evaluations, over the variance of the noise."""
        main, pairs = _kernels(self._correlations, genes, self._genes)
        return self._prior.signal * (main + self._prior.pair_share * pairs)

    def predict(self, genes: Places) -> tuple[Array, Array]:
        """Returns mean and variance of the noise-free fitness of genomes."""
        with_data = self._covariance(genes)
        diagonals = [one.diagonal()[genes[:, gene]] for gene, one in enumerate(self._correlations)]
        main = np.sum(diagonals, axis=0)
        pairs = (main**2 - np.sum(np.square(diagonals), axis=0)) / 2
        own = self._prior.signal * (main + self._prior.pair_share * pairs)
        open_mean = (1.0 - with_data @ self._of_mean) ** 2 / self._of_mean.sum()
        variance = own - np.einsum("ij,jk,ik->i", with_data, self._inverse, with_data) + open_mean
        return self._mean + with_data @ self._weights, self._noise * variance

    def main_effects(self, gene: int) -> tuple[Array, Array]:
        """Returns mean and variance of the effects of a gene's values."""
        own = self._correlations[gene]
        return self._posterior(own[:, self._genes[:, gene]], own.diagonal(), self._prior.signal)

    def pair_effects(self, genes: tuple[int, int]) -> tuple[Array, Array]:
        """Returns mean and variance of the effects of the pairs of two genes' values."""
        (a, b), (one, other) = genes, (self._correlations[gene] for gene in genes)
        with_data = one[:, None, self._genes[:, a]] * other[None, :, self._genes[:, b]]
        own = np.outer(one.diagonal(), other.diagonal()).ravel()
        return self._posterior(with_data.reshape(len(own), -1), own, self._prior.signal * self._prior.pair_share)

    def _posterior(self, with_data: Array, own: Array, signal: float) -> tuple[Array, Array]:
        """Returns mean and variance of effects. with_data: (effects, evaluations) prior covariance; own: prior
        variance; both over `signal` times the variance of the noise."""
        quadratic = np.einsum("ij,jk,ik->i", with_data, self._projected, with_data)
        return signal * (with_data @ self._weights), self._noise * signal * (own - signal * quadratic)

    def left_out(self) -> Array:
        """Returns what each evaluation is predicted as when it is left out."""
        predicted: Array = self._fitness - self._weights / self._projected.diagonal()
        return predicted


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


def _kernels(correlations: Sequence[Array], a: Places, b: Places) -> tuple[Array, Array]:
    """Returns (len(a), len(b)): the prior covariance of genomes by main effects, and by pair effects."""
    main, squares = np.zeros((2, len(a), len(b)))
    for gene, correlation in enumerate(correlations):
        shared = correlation[np.ix_(a[:, gene], b[:, gene])]
        main += shared
        squares += shared**2
    return main, (main**2 - squares) / 2  # the sum over pairs of genes of their products
