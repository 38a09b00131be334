"""Selection, crossover and mutation: pure functions of genomes, fitness and an explicit random generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engine.config.checks import require
from engine.config.marks import result
from ga.evolution.effects import FEWEST, EffectsModel
from ga.evolution.genome import Genes, Space, draw_below
from ga.evolution.kept_layers import FOLLOW

TRIES = 20
"""Mutations of a child that is known already, before a random newcomer takes its place."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one generation makes the next. The defaults: docs/benchmarks.md, "Search quality"."""

    population: int = result(8)
    """Genomes of a generation, and how many of the best known ones may be parents."""
    newcomers: float = result(0.0)
    """Share of a generation that is random."""
    selection: Literal["tournament", "roulette", "rank"] = result("tournament")
    """Way to choose a parent; roulette: in proportion to fitness minus the lowest."""
    tournament_size: int = result(5)
    """Candidates of a tournament; the best one wins."""
    rank_pressure: float = result(1.8)
    """Number of children that the best expects under rank selection, between 1 (no selection) and 2."""
    crossover: Literal["one_point", "two_point", "uniform", "none"] = result("uniform")
    """Way to mix two parents."""
    crossover_rate: float = result(0.9)
    """Probability of a second parent."""
    reset_rate: float = result(0.1)
    """Probability, for each gene, of any other value."""
    creep_rate: float = result(0.3)
    """Probability, for each gene, of the next lower or higher value."""
    prerank: int = result(1)
    """Offspring made for each one that is evaluated: a model of the effects of genes (docs/search.md, "Which student
    layer matters") keeps those that it expects most of. 1: all are evaluated."""

    def __post_init__(self) -> None:
        for name in ("population", "tournament_size", "prerank"):
            least = 2 if name == "population" else 1
            require(getattr(self, name) >= least, f"search.{name}", getattr(self, name), f"must be at least {least}")
        require(1 <= self.rank_pressure <= 2, "search.rank_pressure", self.rank_pressure, "must be between 1 and 2")
        for name in ("newcomers", "crossover_rate", "reset_rate", "creep_rate"):
            require(0 <= getattr(self, name) <= 1, f"search.{name}", getattr(self, name), "must be between 0 and 1")


PRESETS = {
    "default": Settings(),
    "autotinybert": Settings(
        population=25, newcomers=0.5, selection="roulette", crossover="none", reset_rate=0.25, creep_rate=0.0
    ),
}
"""autotinybert: the published loop of Yin et al. 2021 (AutoTinyBERT, ACL): 25 candidates, half of them new, roulette on
fitness minus the minimum, mutation without crossover, duplicates rejected. Its mutation rate is ours."""


OPTIMISM = 1.0
"""Posterior standard deviations that pre-ranking adds to what it expects of a genome."""


def tournament(fitness: Sequence[float], rng: np.random.Generator, *, size: int) -> int:
    """Returns the place of the best of `size` candidates, drawn with replacement."""
    return int(max(rng.integers(len(fitness), size=size), key=lambda i: fitness[i]))


def roulette(fitness: Sequence[float], rng: np.random.Generator) -> int:
    """Draws a place in proportion to fitness minus the lowest; all are alike when they are equal."""
    weights = np.asarray(fitness, np.float64) - min(fitness)
    total = float(weights.sum())
    return int(rng.choice(len(weights), p=weights / total if total > 0 else None))


def rank(fitness: Sequence[float], rng: np.random.Generator, *, pressure: float) -> int:
    """Draws a place by linear ranking (Baker 1985): the best expects `pressure` draws of n, the worst 2 - pressure."""
    n = len(fitness)
    if n == 1:
        return 0
    weights = np.empty(n)
    weights[np.argsort(fitness, kind="stable")] = np.linspace(2 - pressure, pressure, n)
    return int(rng.choice(n, p=weights / weights.sum()))


def one_point(a: Genes, b: Genes, rng: np.random.Generator) -> Genes:
    """Returns the genes of a up to a cut, of b from there."""
    cut = int(rng.integers(1, max(2, len(a))))
    return a[:cut] + b[cut:]


def two_point(a: Genes, b: Genes, rng: np.random.Generator) -> Genes:
    """Returns the genes of b between two cuts, of a outside."""
    low, high = sorted(rng.integers(0, len(a) + 1, size=2).tolist())
    return a[:low] + b[low:high] + a[high:]


def uniform(a: Genes, b: Genes, rng: np.random.Generator, *, share: float = 0.5) -> Genes:
    """Takes each gene from b with probability `share`, else from a."""
    return tuple(y if take else x for x, y, take in zip(a, b, rng.random(len(a)) < share, strict=True))


def reset(genes: Genes, rng: np.random.Generator, *, rate: float, choices: Sequence[Genes]) -> Genes:
    """Replaces each gene, with probability `rate`, by another one of its choices."""
    out = []
    for gene, hit, values in zip(genes, rng.random(len(genes)) < rate, choices, strict=True):
        others = [value for value in values if value != gene]
        out.append(int(rng.choice(others)) if hit and others else gene)
    return tuple(out)


def creep(genes: Genes, rng: np.random.Generator, *, rate: float, choices: Sequence[Genes]) -> Genes:
    """Moves each gene, with probability `rate`, one step up or down in its sorted choices; at an end the only way. A
    kept layer that follows the mapping moves with it alone."""
    out = []
    for gene, hit, values in zip(genes, rng.random(len(genes)) < rate, choices, strict=True):
        steps = [value for value in values if value != FOLLOW]
        at = steps.index(gene) if gene != FOLLOW else len(steps) + 1
        near = [steps[i] for i in (at - 1, at + 1) if 0 <= i < len(steps)]
        out.append(int(rng.choice(near)) if hit and near else gene)
    return tuple(out)


def next_generation(
    space: Space, history: Mapping[Genes, float], settings: Settings, rng: np.random.Generator, *, count: int
) -> list[Genes]:
    """Makes `count` genomes of the space that are neither in `history` nor twice; fewer only when the space has no
    more.

    history: mean fitness of every genome proposed so far, larger = better; nan: it has none, so it is no parent, and
    not proposed again. The order of `history` does not matter. The `population` best known genomes are the parents: the
    elite is kept for ever, and never paid for twice. With settings.prerank the best of so many times as many offspring
    are kept, as `rank_by_model` sorts them.
    """
    scored = {genes: value for genes, value in history.items() if not math.isnan(value)}
    if settings.prerank > 1 and len(scored) >= FEWEST:
        wide = replace(settings, prerank=1)
        offspring = next_generation(space, history, wide, rng, count=settings.prerank * count)
        return rank_by_model(space, scored, offspring)[:count]
    known = set(history)
    ranked = sorted((genes for genes in history if not math.isnan(history[genes])), key=lambda g: (-history[g], g))
    parents = ranked[: settings.population]
    fitness = [history[genes] for genes in parents]
    made: list[Genes] = []
    children = count - round(settings.newcomers * count) if len(parents) > 1 else 0
    for i in range(min(count, space.size() - sum(genes in space for genes in known))):
        child = _child(space, parents, fitness, settings, rng, known) if i < children else None
        if child is None:
            child = draw_unseen(space, known, rng)
        known.add(child)
        made.append(child)
    return made


def rank_by_model(space: Space, scored: Mapping[Genes, float], offspring: Sequence[Genes]) -> list[Genes]:
    """Sorts genomes by what a model of `scored` (fitness by genome) hopes of them, the best first: their posterior mean
    and OPTIMISM standard deviations. Equal ones keep their order."""
    model = EffectsModel(list(scored), list(scored.values()), space.gene_choices)
    mean, deviation = model.predict(offspring)
    hopes = np.round(mean + OPTIMISM * deviation, 12)  # rounding of another machine must not decide
    return [offspring[i] for i in np.argsort(-hopes, kind="stable")]


def _child(
    space: Space,
    parents: Sequence[Genes],
    fitness: Sequence[float],
    settings: Settings,
    rng: np.random.Generator,
    known: set[Genes],
) -> Genes | None:
    """Returns a child that is not known yet; None when it is, however often it is mutated."""
    child = _select(parents, fitness, settings, rng)
    mix = CROSSOVERS.get(settings.crossover)
    if mix is not None and rng.random() < settings.crossover_rate:
        child = mix(child, _select(parents, fitness, settings, rng), rng)
    for _ in range(TRIES):
        child = reset(child, rng, rate=settings.reset_rate, choices=space.gene_choices)
        child = space.repair(creep(child, rng, rate=settings.creep_rate, choices=space.gene_choices))
        if child not in known:
            return child
    return None


def _select(parents: Sequence[Genes], fitness: Sequence[float], settings: Settings, rng: np.random.Generator) -> Genes:
    if settings.selection == "tournament":
        return parents[tournament(fitness, rng, size=settings.tournament_size)]
    if settings.selection == "roulette":
        return parents[roulette(fitness, rng)]
    return parents[rank(fitness, rng, pressure=settings.rank_pressure)]


CROSSOVERS: dict[str, Callable[[Genes, Genes, np.random.Generator], Genes]] = {
    "one_point": one_point,
    "two_point": two_point,
    "uniform": uniform,
}


def draw_unseen(space: Space, known: set[Genes], rng: np.random.Generator) -> Genes:
    """Draws a genome that is not in `known`, each with the same probability. There must be one."""
    # the k-th of them in the order of the space
    taken = sorted(space.index(genes) for genes in known if genes in space)
    index = draw_below(rng, space.size() - len(taken))
    for other in taken:
        if other > index:
            break
        index += 1
    return space.at(index)


def diversity(genomes: Sequence[Genes]) -> float:
    """Returns the mean over genes of the entropy of a gene's values, divided by the log of the number of genomes: 0
    when all genomes are the same, 1 when no two share a gene."""
    if len(genomes) < 2:
        return 0.0
    entropies = []
    for values in zip(*genomes, strict=True):
        shares = np.unique(values, return_counts=True)[1] / len(genomes)
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return float(np.mean(entropies)) / math.log(len(genomes))
