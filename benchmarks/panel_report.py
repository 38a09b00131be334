"""What a panel (panel.py) says: how well a ranking at one horizon predicts the end of another seed.

For each task, and for the mean over tasks of the share of the gap between start and teacher that is closed (of tasks at
which the teacher is better): the ceiling is Spearman's correlation between the ends of two seeds, which is what a
perfect proxy of one seed could reach; then for each candidate, a horizon of seed A against the end of seed B, the mean
over both orders of the two seeds:

- Spearman's correlation, its share of the ceiling, and Spearman's within the upper half of the end of seed B;
- regret: how much worse than the best at the end of seed B is what the candidate calls best, and the best of what it
  calls its three best; in standard deviations between the seeds of one mapping at the end.

"effects" is the prediction of the effects model (ga/evolution/effects.py), fitted to the same scores. Intervals are of
95 %, from 2,000 resamples of the mappings. `none` is no candidate: it is what mappings must beat.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import numpy.typing as npt
from campaign import Row
from measuring import header
from pilot import START, TEACHER
from scipy.stats import rankdata

from engine.mapping import SKIP
from engine.records.stats import Signal, signal_ratio
from engine.records.yardstick import is_none
from ga.evolution.effects import FEWEST, EffectsModel

MEAN = "mean of tasks"
WARM = " warm"
RESAMPLES = 2000

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Array]
"""Seed -> (mappings,) scores, in the order of the mappings."""
Value = Callable[[Row], float]


@dataclass(frozen=True)
class Candidate:
    """A way to rank mappings."""

    name: str
    tokens: int
    """Of training, a student."""
    core_seconds: float
    """A student."""
    scores: Scores


def over_pairs(value: Callable[[Array, Array], Array], scores: Scores, end: Scores) -> Array:
    """Returns the mean over the ordered pairs of different seeds: scores of the one against the end of the other."""
    pairs = [(a, b) for a, b in itertools.permutations(end, 2) if a in scores]
    return np.asarray(np.mean([value(scores[a], end[b]) for a, b in pairs], axis=0))


def correlation(a: Array, b: Array) -> Array:
    """Returns Spearman's coefficient over the last axis; nan where one side is constant."""
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(a, axis=-1), rankdata(b, axis=-1)))
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    products = np.asarray((x * y).sum(-1))
    found: Array = np.divide(products, size, out=np.full_like(products, math.nan), where=size > 0)
    return found


def upper_correlation(ranking: Array, truth: Array) -> Array:
    upper = truth >= np.median(truth)
    return correlation(ranking[upper], truth[upper])


def regret(ranking: Array, truth: Array, count: int) -> Array:
    """Returns by how much the best of the first `count` of a ranking is worse than the best of all."""
    first = np.argsort(-ranking, kind="stable")[:count]
    return np.asarray(truth.max() - truth[first].max())


def mean_correlation(scores: Scores, end: Scores) -> Array:
    return over_pairs(correlation, scores, end)


def share_of_ceiling(scores: Scores, end: Scores) -> Array:
    return mean_correlation(scores, end) / mean_correlation(end, end)


def interval(scores: Scores, end: Scores, value: Callable[[Scores, Scores], Array]) -> str:
    """Returns the value over all mappings, and its interval; `-` where there is none."""
    count = len(next(iter(end.values())))
    at = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    found = float(value(scores, end))
    if math.isnan(found):
        return "-"
    samples = value(*({seed: one[at] for seed, one in side.items()} for side in (scores, end)))
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def report(rows: Sequence[Row], tasks: Sequence[str], finetuned: Sequence[Row] = ()) -> None:
    regimes = dict.fromkeys(row["regime"] for row in rows)
    for regime in regimes:
        if not regime.endswith(WARM):
            own = [row for row in rows if row["regime"] == regime]
            warm = [row for row in rows if row["regime"] == regime + WARM]
            print_regime(regime, own, warm, tasks)
            print_finetuned(own, [row for row in finetuned if row["regime"] == regime])


def print_regime(regime: str, rows: Sequence[Row], warm: Sequence[Row], tasks: Sequence[str]) -> None:
    trained = [row for row in rows if row["genome"] not in (START, TEACHER) and not is_none(row["genome"])]
    seeds = sorted({row["seed"] for row in trained})
    ends = [max((int(row["steps"]) for row in trained if row["seed"] == seed), default=0) for seed in seeds]
    if len(seeds) < 2 or len(set(ends)) > 1:
        print(f"## {regime}: no two seeds have the same end yet\n")
        return
    table = [row for row in trained if int(row["steps"]) == ends[0]]
    genomes = sorted(set.intersection(*({row["genome"] for row in table if row["seed"] == seed} for seed in seeds)))
    if not genomes:
        print(f"## {regime}: no mapping has the end of both seeds yet\n")
        return
    print(f"## {regime}: {len(genomes)} mappings, {len(seeds)} seeds, to {ends[0]:,} steps\n")
    print_spread(rows, genomes, tasks, ends[0])
    for task, value in values(rows, tasks).items():
        end = scores_of(table, genomes, seeds, value)
        print_task(task, end, candidates(trained, warm, genomes, seeds, value))


def values(rows: Sequence[Row], tasks: Sequence[str]) -> Mapping[str, Value]:
    """Returns what a row is judged by: the mean share of the gap that is closed, where any task counts, and each
    task."""

    starts, teacher = (
        {task: fmean(float(row[task]) for row in rows if row["genome"] == name) for task in tasks}
        for name in (START, TEACHER)
    )
    counted = [task for task in tasks if teacher[task] > starts[task]]

    def closed(row: Row) -> float:
        return fmean((float(row[task]) - starts[task]) / (teacher[task] - starts[task]) for task in counted)

    scores: dict[str, Value] = {task: partial(score, task) for task in tasks}
    return {MEAN: closed, **scores} if counted else scores


def score(task: str, row: Row) -> float:
    return float(row[task])


def scores_of(rows: Sequence[Row], genomes: Sequence[str], seeds: Sequence[str], value: Value) -> dict[str, Array]:
    """Seeds without a score of every mapping are left out."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["seed"]][row["genome"]] = value(row)
    return {
        seed: np.array([found[seed][genome] for genome in genomes])
        for seed in seeds
        if all(genome in found[seed] for genome in genomes)
    }


def candidates(
    rows: Sequence[Row],
    warm: Sequence[Row],
    genomes: Sequence[str],
    seeds: Sequence[str],
    value: Value,
) -> list[Candidate]:
    found = []
    for kind, own in (("", rows), ("warm, ", warm)):
        spent = 0.0
        for steps in sorted({int(row["steps"]) for row in own if row["genome"] != START}):
            at = [row for row in own if int(row["steps"]) == steps and row["genome"] != START]
            spent += fmean(float(row["core_seconds"]) for row in at)  # a horizon goes on from the one before
            scores = scores_of(at, genomes, seeds, value)
            if scores:
                tokens = int(at[0]["tokens"])
                found.append(Candidate(f"{kind}{steps}", tokens, spent, scores))
                if len(genomes) >= FEWEST:
                    effects = {seed: predicted(genomes, one) for seed, one in scores.items()}
                    found.append(Candidate(f"{kind}{steps}, effects", tokens, spent, effects))
    return found


def predicted(genomes: Sequence[str], scores: Array) -> Array:
    genes = [tuple(int(gene) for gene in genome.split("-")) for genome in genomes]
    choices = [tuple(sorted({SKIP, *column})) for column in zip(*genes, strict=True)]
    mean, _ = EffectsModel(genes, list(scores), choices).predict(genes)
    return mean


def print_task(task: str, end: Scores, found: Sequence[Candidate]) -> None:
    noise = math.sqrt(fmean(float(np.var(column, ddof=1)) for column in zip(*end.values(), strict=True)))

    print(f"### {task}: ceiling {interval(end, end, mean_correlation)}, seed deviation {noise:.4f}\n")
    columns = ("tokens", "core-seconds a student", "Spearman", "share of the ceiling", "upper half")
    print(header("steps", *columns, "regret of the best", "regret of the best three"))
    for one in found:
        cells = [one.name, f"{one.tokens:,}", f"{one.core_seconds:.0f}"]
        cells += [interval(one.scores, end, value) for value in (mean_correlation, share_of_ceiling)]
        upper = float(over_pairs(upper_correlation, one.scores, end))
        cells.append("-" if math.isnan(upper) else f"{upper:.2f}")
        regrets = [float(over_pairs(partial(regret, count=count), one.scores, end)) for count in (1, 3)]
        cells += [f"{value / noise:.1f}" if noise else "-" for value in regrets]
        print(f"| {' | '.join(cells)} |")
    print()


def print_spread(rows: Sequence[Row], genomes: Sequence[str], tasks: Sequence[str], end: int) -> None:
    """At each horizon: what mappings must beat, how far they are apart, and how many are past it."""
    print(header("task", "steps", "start", "none", "teacher", "mean", "best", "between / within", "past the crossover"))
    for task in tasks:
        of = {name: [float(row[task]) for row in rows if row["genome"] == name] for name in (START, TEACHER)}
        for steps in sorted({int(row["steps"]) for row in rows} - {0}):
            at = [row for row in rows if int(row["steps"]) == steps]
            none = [float(row[task]) for row in at if is_none(row["genome"])]
            scores = {
                genome: {int(row["seed"]): float(row[task]) for row in at if row["genome"] == genome}
                for genome in genomes
            }
            means = {genome: fmean(values.values()) for genome, values in scores.items() if values}
            if not means or not none:
                continue
            signal = signal_ratio(scores)
            best = max(means, key=means.__getitem__)
            cells = [task, f"{steps:,}", *(f"{fmean(values):.4f}" for values in (of[START], none, of[TEACHER]))]
            cells += [
                f"{fmean(means.values()):.4f}",
                f"{best} {means[best]:.4f}",
                *past(signal, of[START], none, means),
            ]
            print(f"| {' | '.join(cells)} |")
    print()


def past(
    signal: Signal | None, start: Sequence[float], none: Sequence[float], means: Mapping[str, float]
) -> tuple[str, str]:
    """Returns the ratio of variances without what seeds add, and the share of mappings that are better than start and
    none by two seed deviations."""
    if signal is None or signal.ratio is None:
        return "-", "-"
    bar = max(fmean(start), fmean(none)) + 2 * math.sqrt(signal.within)
    count = sum(mean > bar for mean in means.values())
    return f"{max(0.0, signal.ratio - signal.chance):.1f}", f"{count} of {len(means)}"


def print_finetuned(rows: Sequence[Row], finetuned: Sequence[Row]) -> None:
    """Correlation of probes at the end with fine-tuned scores; both are means over seeds."""
    if not finetuned:
        return
    names = ("regime", "seed", "genome", "finetune_seed", "core_seconds")
    end = max(int(row["steps"]) for row in rows)
    genomes = sorted({row["genome"] for row in finetuned})
    print(f"### Fine-tuned: {len(genomes)} mappings\n")
    print(header("task", "Spearman with the probe", "between / within", "best when probed", "best when fine-tuned"))
    for task in (name for name in finetuned[0] if name not in names):
        probed, tuned = (
            {genome: [float(row[task]) for row in own if row["genome"] == genome] for genome in genomes}
            for own in ([row for row in rows if int(row["steps"]) == end], finetuned)
        )
        means = [{genome: fmean(values) for genome, values in side.items()} for side in (probed, tuned)]
        a, b = (np.array([side[genome] for genome in genomes]) for side in means)
        shown = interval({"0": a, "1": a}, {"0": b, "1": b}, mean_correlation)
        signal = signal_ratio(tuned)
        ratio = "-" if signal is None or signal.ratio is None else f"{max(0.0, signal.ratio - signal.chance):.1f}"
        best = [max(side, key=side.__getitem__) for side in means]
        print(f"| {task} | {shown} | {ratio} | {best[0]} {means[1][best[0]]:.4f} | {best[1]} {means[1][best[1]]:.4f} |")
    print()
