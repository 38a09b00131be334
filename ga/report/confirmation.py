"""What the confirmation of a search says: its best genomes and a reference (uniform), run again with seeds that the
search has not seen. Pure statistics of genome -> seed -> fitness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from engine.records.stats import ROUNDING

Confirmed = Mapping[str, Mapping[int, float]]

LEVEL = 0.95
METHOD = (
    "Intervals are two-sided 95 % intervals of Student's t for the mean of the differences at equal seeds, with "
    "Bonferroni's correction for the number of genomes compared (O. J. Dunn, Multiple Comparisons Among Means, Journal "
    "of the American Statistical Association 56, 1961): the chance that any of them misses is at most 5 %. t assumes "
    "that the differences are about normal, which so few seeds cannot show."
)


@dataclass(frozen=True)
class Difference:
    """A genome's fitness minus the reference's, at equal seeds."""

    genome: str
    mean: float | None
    """Mean difference; None without a shared seed."""
    low: float | None
    """End of the interval; None below two shared seeds."""
    high: float | None
    n: int
    """Number of shared seeds."""

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval, and 0 is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def compare(confirmed: Confirmed, reference: str) -> list[Difference]:
    """Compares every other genome with `reference`, best mean first, those without a shared seed last. Intervals are
    as METHOD says."""
    others = [genome for genome, by_seed in confirmed.items() if by_seed and genome != reference]
    baseline = confirmed.get(reference, {})
    found = [_difference(genome, confirmed[genome], baseline, comparisons=len(others)) for genome in others]
    return sorted(found, key=lambda one: -math.inf if one.mean is None else one.mean, reverse=True)


def _difference(
    genome: str, by_seed: Mapping[int, float], baseline: Mapping[int, float], *, comparisons: int
) -> Difference:
    shared = sorted(by_seed.keys() & baseline.keys())
    if not shared:
        return Difference(genome, None, None, None, 0)
    smallest = ROUNDING * max(abs(side[seed]) for side in (by_seed, baseline) for seed in shared)
    differences = [by_seed[seed] - baseline[seed] for seed in shared]
    mean = fmean(differences)
    if abs(mean) <= smallest:
        mean = 0.0
    if len(shared) < 2:
        return Difference(genome, mean, None, None, 1)
    deviation = stdev(differences)
    if deviation <= smallest:
        return Difference(genome, mean, mean, mean, len(shared))
    half = _t_quantile(1 - (1 - LEVEL) / (2 * comparisons), len(shared) - 1) * deviation / math.sqrt(len(shared))
    return Difference(genome, mean, mean - half, mean + half, len(shared))


def _t_quantile(probability: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def winner(confirmed: Confirmed) -> str:
    """Returns the genome with the best mean over all seeds of the confirmation; of equal ones the first. One that
    lacks a seed (its job failed) competes only when no genome has them all: failing must not help."""
    most = max((len(by_seed) for by_seed in confirmed.values()), default=0)
    assert most, "nothing was confirmed"
    complete = {genome: by_seed for genome, by_seed in confirmed.items() if len(by_seed) == most}
    return max(complete, key=lambda genome: fmean(complete[genome].values()))


def seed_deviation(confirmed: Confirmed) -> float | None:
    """Returns the standard deviation between the seeds of one genome, pooled over genomes; None without a genome
    with two seeds."""
    repeated = [list(by_seed.values()) for by_seed in confirmed.values() if len(by_seed) > 1]
    if not repeated:
        return None
    squares = sum(variance(values) * (len(values) - 1) for values in repeated)
    return math.sqrt(squares / sum(len(values) - 1 for values in repeated))


def verdict(confirmed: Confirmed, reference: str) -> str:
    """Returns one honest sentence or two about the winner. `reference` is uniform's genome; `confirmed` is not
    empty. A fitness is a share of the gap between the untrained student and the teacher."""
    uniform = f"uniform ({reference})"
    best = winner(confirmed)
    differences = compare(confirmed, reference)
    if best == reference:
        return f"{uniform} itself won: {_runner_up(differences)}"
    difference = next(one for one in differences if one.genome == best)
    if difference.mean is None:
        return (
            f"{best} has the best mean over the new seeds, but {uniform} has no fitness with any of them: no evidence "
            "that the winner is better than uniform."
        )
    found = f"{best} {_more_or_less(difference)} than {uniform}"
    if difference.n < 2:
        return (
            f"{found}, but with the one new seed that both have, and one seed shows no noise: no evidence that the "
            "winner is better than uniform; confirm with more seeds."
        )
    if difference.is_clear:
        return f"{found}{_basis(difference)}" + ("." if difference.mean > 0 else "; use uniform.")
    return (
        f"No difference from {uniform} was found: the winner, {best}, {_more_or_less(difference)}"
        f"{_basis(difference)}, within noise; use uniform or confirm with more seeds."
    )


def _runner_up(differences: list[Difference]) -> str:
    """Returns what follows after `uniform itself won:`."""
    if not differences or differences[0].mean is None:
        return "no other genome has a fitness with the new seeds."
    next_best = differences[0]
    found = f"the next best, {next_best.genome}, {_more_or_less(next_best)}"
    if next_best.n < 2:
        return f"{found} with one new seed. The search has found nothing better."
    clear = "" if next_best.is_clear else ", within noise"
    return f"{found}{_basis(next_best)}{clear}. The search has found nothing better."


def _more_or_less(difference: Difference) -> str:
    """Returns `closes 0.119 ± 0.052 more of the gap`, with two digits of the half interval."""
    assert difference.mean is not None
    word = "more" if difference.mean >= 0 else "less"
    if difference.high is None:
        return f"closes {abs(difference.mean):.4f} {word} of the gap"
    half = difference.high - difference.mean
    digits = min(4, max(1, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    return f"closes {abs(difference.mean):.{digits}f} ± {half:.{digits}f} {word} of the gap"


def _basis(difference: Difference) -> str:
    return f" (95 % interval, {difference.n} new seeds)"
