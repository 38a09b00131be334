"""The effects model against explicit Bayesian regression, against truths that it was drawn from, and at its edges."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import block_diag

from ga.evolution import effects
from ga.evolution.effects import EffectsModel, Prior
from ga.evolution.genome import Genes, Space

SPACE = Space(student_layers=3, teacher_layers=4)
CHOICES = [SPACE.choices] * SPACE.length
ALL = list(SPACE)


def drawn(count: int, seed: int) -> list[Genes]:
    return random.Random(seed).sample(ALL, count)


def additive(genes: Genes) -> float:
    """Layer 3 wants teacher layer 4, layer 1 none; layer 2 does not matter."""
    return 0.1 * genes[2] - 0.05 * (genes[0] > 0)


def noisy(genomes: list[Genes], deviation: float, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [additive(genes) + deviation * float(rng.normal()) for genes in genomes]


def test_effects_are_those_of_the_truth() -> None:
    genomes = drawn(60, 1)
    model = EffectsModel(genomes, noisy(genomes, 0.01), CHOICES)
    first, second, third = model.main_effects
    for layer in range(5):
        assert third[layer].mean == pytest.approx(0.1 * (layer - 2), abs=0.02)
        assert second[layer].mean == pytest.approx(0.0, abs=0.02)
    assert first[0].mean == pytest.approx(0.04, abs=0.02)
    assert all(one.is_clear for one in (third[4], third[0], first[0]))
    assert not any(one.is_clear for one in second.values())
    assert model.left_out_correlation() > 0.97


def test_a_pair_of_genes_is_found() -> None:
    genomes = drawn(100, 2)
    fitness = [
        value + 0.2 * (genes[0] == genes[1] == 3) for genes, value in zip(genomes, noisy(genomes, 0.01), strict=True)
    ]
    strongest = EffectsModel(genomes, fitness, CHOICES).pair_effects[0]
    assert (strongest.genes, strongest.values) == ((0, 1), (3, 3))
    assert strongest.estimate.mean == pytest.approx(0.2 * 16 / 25, abs=0.03)  # beyond its main effects, 4/5 of 4/5
    assert strongest.estimate.is_clear


def design(genomes: list[Genes]) -> np.ndarray:
    """A column of ones, one for each value of each gene, and one for each pair of values of each pair of genes."""
    pairs = list(itertools.combinations(range(3), 2))
    return np.array(
        [
            [1.0]
            + [float(genes[m] == g) for m in range(3) for g in range(5)]
            + [float((genes[a], genes[b]) == gh) for a, b in pairs for gh in itertools.product(range(5), repeat=2)]
            for genes in genomes
        ]
    )


def one_prior(monkeypatch: pytest.MonkeyPatch, prior: Prior) -> None:
    """Leaves one prior of the grid."""
    monkeypatch.setattr(effects, "SMOOTHNESS", (prior.smoothness,))
    monkeypatch.setattr(effects, "PAIR_SHARES", (prior.pair_share,))
    monkeypatch.setattr(effects, "SIGNALS", (prior.signal,))


@pytest.mark.parametrize("prior", [Prior(0.0, 0.0, 0.5), Prior(0.8, 0.3, 2.0)])
def test_with_one_prior_it_is_the_explicit_regression(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every effect as a weight: normal prior, posterior by the textbook, the mean under a very wide prior."""
    one_prior(monkeypatch, prior)
    genomes = drawn(40, 3)
    fitness = np.array(noisy(genomes, 0.05)) + [0.02 * genes[0] * genes[1] for genes in genomes]
    model = EffectsModel(genomes, list(fitness), CHOICES)
    layers = np.arange(5)
    raw = prior.smoothness ** np.abs(layers[:, None] - layers).astype(float)
    raw[0], raw[:, 0], raw[0, 0] = 0.0, 0.0, 1.0
    middle = np.eye(5) - 1 / 5
    gene = middle @ raw @ middle
    gene /= gene.diagonal().mean()
    both = prior.pair_share * np.kron(gene, gene)
    wide = block_diag(1e6, *[prior.signal * gene] * 3, *[prior.signal * both] * 3)
    known = design(genomes)
    covariance = known @ wide @ known.T + np.eye(len(genomes))
    gain = wide @ known.T @ np.linalg.inv(covariance)
    means, posterior = gain @ fitness, wide - gain @ known @ wide
    noise = float(fitness @ np.linalg.solve(covariance, fitness)) / 39
    half = stats.t(39).ppf(0.975) * np.sqrt(noise * posterior.diagonal())
    main = [one for by_value in model.main_effects for one in by_value.values()]
    np.testing.assert_allclose([one.mean for one in main], means[1:16], atol=1e-4)
    np.testing.assert_allclose([one.high - one.mean for one in main], half[1:16], rtol=1e-3)
    found = {(one.genes, one.values): one.estimate for one in model.pair_effects}
    names = [(ab, gh) for ab in itertools.combinations(range(3), 2) for gh in itertools.product(range(5), repeat=2)]
    np.testing.assert_allclose([found[name].mean for name in names], means[16:], atol=1e-4)
    np.testing.assert_allclose([found[name].high - found[name].mean for name in names], half[16:], rtol=1e-3, atol=1e-9)
    predicted, deviation = model.predict(ALL)
    rows = design(ALL)
    np.testing.assert_allclose(predicted, rows @ means, atol=1e-4)
    want = np.sqrt(noise * np.einsum("ij,jk,ik->i", rows, posterior, rows))
    np.testing.assert_allclose(deviation, want, rtol=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.normal(0, 0.1, (3, 5))
        truth -= truth.mean(1, keepdims=True)
        genomes = drawn(40, seed)
        fitness = [sum(truth[m, g] for m, g in enumerate(genes)) + 0.1 * float(rng.normal()) for genes in genomes]
        for m, by_value in enumerate(EffectsModel(genomes, fitness, CHOICES).main_effects):
            held += [one.low <= truth[m, value] <= one.high for value, one in by_value.items()]
    assert 0.92 <= np.mean(held) <= 0.98


def test_noise_alone_has_hardly_a_clear_effect() -> None:
    clear = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=40)
        model = EffectsModel(drawn(40, seed), list(values), CHOICES)
        clear += [one.is_clear for by_value in model.main_effects for one in by_value.values()]
    assert np.mean(clear) < 0.05


def test_equal_fitness_says_nothing() -> None:
    model = EffectsModel(drawn(20, 4), [0.5] * 20, CHOICES)
    assert not any(one.is_clear for by_value in model.main_effects for one in by_value.values())
    assert model.left_out_correlation() == 0.0
    assert model.predict(ALL)[0] == pytest.approx(0.5)


def test_the_order_of_evaluations_does_not_matter() -> None:
    genomes = drawn(30, 5)
    fitness = noisy(genomes, 0.05)
    pairs = list(zip(genomes, fitness, strict=True))
    random.Random(1).shuffle(pairs)
    shuffled = EffectsModel([genes for genes, _ in pairs], [value for _, value in pairs], CHOICES)
    assert shuffled.main_effects == EffectsModel(genomes, fitness, CHOICES).main_effects


def test_a_left_out_evaluation_is_predicted_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one_prior(monkeypatch, Prior(0.5, 0.2, 1.0))
    genomes = drawn(12, 6)
    fitness = noisy(genomes, 0.05)
    predicted = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        model = EffectsModel([genomes[j] for j in others], [fitness[j] for j in others], CHOICES)
        predicted.append(float(model.predict([genomes[i]])[0][0]))
    whole = EffectsModel(genomes, fitness, CHOICES)
    assert whole.left_out_correlation() == pytest.approx(np.corrcoef(predicted, fitness)[0, 1], abs=1e-9)


def test_priors_that_the_evaluations_do_not_tell_apart_widen_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    genomes = drawn(12, 7)
    fitness = noisy(genomes, 0.03)
    mixed = EffectsModel(genomes, fitness, CHOICES)
    weights = {fit._prior: weight for weight, fit in mixed._fits}
    assert sum(weights.values()) == pytest.approx(1.0)
    assert len(weights) > 10
    one_prior(monkeypatch, max(weights, key=lambda prior: weights[prior]))
    single = EffectsModel(genomes, fitness, CHOICES)

    def width(model: EffectsModel) -> float:
        return sum(one.high - one.low for by_value in model.main_effects for one in by_value.values())

    assert width(mixed) > width(single)


def test_of_too_many_evaluations_the_best_and_the_worst_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "MOST", 20)
    model = EffectsModel(ALL, [additive(genes) for genes in ALL], CHOICES)
    assert model.evaluations == 20
    assert np.ptp(model._fitness) == pytest.approx(0.45)


def test_a_gene_may_have_values_of_its_own() -> None:
    choices = [(-1, 0, 1), (0, 2)]
    genomes = list(itertools.product(*choices)) * 2
    model = EffectsModel(genomes, [float(genes[1] == 2) for genes in genomes], choices)
    first, second = model.main_effects
    assert [list(first), list(second)] == [[-1, 0, 1], [0, 2]]
    assert second[2].mean == pytest.approx(0.5, abs=0.05)
