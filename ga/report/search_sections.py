"""The report's sections on what the search itself has found and cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median, stdev

from engine.records.columns import duration_text
from engine.records.stats import signal_ratio
from engine.records.yardstick import describe_yardstick
from ga.jobs.outcome import Outcome
from ga.report.confirmation import Confirmed, seed_deviation
from ga.report.facts import Facts
from ga.report.tables import table
from ga.study.evaluations import (
    RUNNING,
    STOPPED_EARLY,
    Evaluation,
    correlation_at,
    rank_evaluations,
    report_steps,
    spent_evaluations,
)
from ga.study.sources import deepest_layer

LEADERBOARD = "leaderboard.csv"
SHOWN, SHOWN_FAILURES = 10, 20
TRUSTED_CORRELATION, FEWEST_TO_TRUST = 0.8, 10


def best_genomes(facts: Facts, evaluations: Sequence[Evaluation]) -> list[str]:
    best = rank_evaluations(evaluations)
    place = {one.genome: str(i) for i, one in enumerate(best, start=1)}
    uniform = next((one for one in best if one.genome == facts.uniform), None)
    outcome = {one.genome: one.outcome for one in spent_evaluations(evaluations)}
    known = {one.genome: one for one in best}
    rows = []
    for genome in dict.fromkeys([*list(known)[:SHOWN], *facts.heuristics.values()]):
        one = known.get(genome)
        if one is None:
            values = [outcome.get(genome, "not evaluated"), *[""] * (len(facts.tasks) + 2)]
        else:
            scores = [f"{one.scores[task]:.4f}" if task in one.scores else "" for task in facts.tasks]
            values = [f"{one.fitness:.4f}", *scores, difference_text(one, uniform), str(one.number)]
        rows.append([place.get(genome, ""), genome, facts.names(genome), *values])
    return [
        f"The {min(SHOWN, len(best))} best of {len(best)} genomes, then the heuristics that are not among them. "
        f"Fitness is what [the yardstick](#what-fitness-is-measured-by) makes of the task scores{_over_seeds(facts)}. "
        f"All are in [{LEADERBOARD}]({LEADERBOARD}).",
        table(["place", "genome", "heuristic", "fitness", *facts.tasks, "minus uniform", "trial"], rows, left=(1, 2)),
    ]


def _over_seeds(facts: Facts) -> str:
    return f" over {len(facts.seeds)} seeds" if len(facts.seeds) > 1 else ""


def difference_text(one: Evaluation, uniform: Evaluation | None) -> str:
    if uniform is None or uniform.fitness is None or one.fitness is None:
        return ""
    return f"{one.fitness - uniform.fitness:.4f}"


def yardstick(facts: Facts) -> list[str]:
    """Tells what each task's scores are measured against, and how far they are trusted."""
    scales, noise, none = facts.yardstick.scales, facts.yardstick.noise, facts.yardstick.none
    total = sum(scale.weight for scale in scales.values())
    rows = []
    for task, scale in scales.items():
        gap = scale.teacher - scale.start
        known = [f"{noise[task].deviation:.4f}", f"{noise[task].reliability:.2f}"] if task in noise else ["", ""]
        rows.append(
            [
                task,
                f"{scale.start:.4f}",
                f"{none[task]:.4f}" if task in none else "",
                f"{scale.teacher:.4f}",
                f"{gap:.4f}",
                *known,
                f"{scale.weight / total:.2f}" if scale.weight else "does not count",
            ]
        )
    header = ["scored on", "untrained", "none", "teacher", "gap", "deviation between seeds", "reliability", "weight"]
    return [
        "The share of the gap between the untrained student (of the uniform mapping) and the teacher that a student "
        "closes, on training rows: 0 as it started, 1 as good as the teacher. `none` had the same steps without any "
        "mapped layer. A task counts if its gap is larger than three deviations between seeds, by its reliability: "
        "variance between mappings over that plus variance between seeds, of the heuristics. Fixed before the first "
        "evaluation.",
        table(header, rows, left=(0,)),
    ]


def seed_noise(evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    """Compares seed noise with the spread of fitness."""
    best = rank_evaluations(evaluations)
    values = [float(one.fitness or 0.0) for one in best]
    if len(best) < 2:
        return "One genome has a fitness: there is nothing to compare it with."
    top = values[: math.ceil(len(values) / 4)]
    quarter = f" ({stdev(top):.4f} among the best quarter)" if len(top) > 2 else ""
    spread = f"Standard deviation of fitness between the {len(best)} genomes: {stdev(values):.4f}{quarter}."
    repeated = {one.genome: one.by_seed for one in best if len(one.by_seed) > 1}
    by_seed, whose = (repeated, "the search") if repeated else (confirmed, "the confirmation")
    noise = seed_deviation(by_seed)
    if noise is None:
        return f"{spread} The noise between seeds is not known: search.confirm_top or proxy.repeats shows it."
    text = f"{spread} Between seeds of one genome: {noise:.4f}, pooled over {len(by_seed)} genomes of {whose}"
    signal = signal_ratio(by_seed)
    if signal is not None and signal.paired_within is not None:
        noise = math.sqrt(signal.paired_within)
        text += f"; {noise:.4f} when each seed's own effect, the same for all genomes, is taken out"
    seeds = max(1, min(len(one.by_seed) for one in best))
    step = noise * math.sqrt(2 / seeds)
    near = sum(value >= values[0] - 2 * step for value in values) - 1
    order = "the search alone does not settle their order" if near else "it stands out from the noise between seeds"
    same = f"{seeds} seeds" if seeds > 1 else "seed"
    return (
        f"{text}. The search compares genomes at the same {same}, so the difference of two has a standard deviation of "
        f"about {step:.4f}. Other genomes within two of these of the best one: {near or 'none'}; {order}."
    )


def other_searches(evaluations: Sequence[Evaluation], others: Mapping[str, Sequence[Evaluation]]) -> list[str]:
    budget = len(spent_evaluations(evaluations))
    rows = []
    for name, one in [("this search", evaluations), *others.items()]:
        spent = spent_evaluations(one)
        equal, end = rank_evaluations(spent[:budget]), rank_evaluations(spent)
        cells = [f"{equal[0].fitness:.4f}" if equal else "", f"{end[0].fitness:.4f}" if end else ""]
        rows.append([name, str(len(spent)), *cells, end[0].genome if end else ""])
    header = ["search", "evaluations", f"best of its first {budget}", "best of all", "genome"]
    return [
        "Searches of the same storage with the same proxy and seeds. One run each: which sampler is better in general "
        "takes many.",
        table(header, rows, left=(0, 4)),
    ]


def front(facts: Facts, evaluations: Sequence[Evaluation]) -> list[str]:
    best: list[Evaluation] = []
    for one in sorted(
        rank_evaluations(evaluations), key=lambda one: (-float(one.fitness or 0.0), deepest_layer(one.genome))
    ):
        if not best or deepest_layer(one.genome) < deepest_layer(best[-1].genome):
            best.append(one)
    rows = [[str(deepest_layer(one.genome)), f"{one.fitness:.4f}", one.genome, facts.names(one.genome)] for one in best]
    return [
        "No genome is better than one of these without a deeper teacher (the teacher stops after the deepest layer "
        "that a mapping names).",
        table(["deepest teacher layer", "fitness", "genome", "heuristic"], rows, left=(2, 3)),
    ]


def intermediate_scores(evaluations: Sequence[Evaluation]) -> list[str]:
    """Tells how well an early score ranks the late one."""
    rows, judged = [], []
    for step in report_steps(evaluations):
        correlation, n = correlation_at(step, evaluations)
        rows.append([str(step), str(n), "" if correlation is None else f"{correlation:.2f}", _kept(step, evaluations)])
        if correlation is not None and n >= FEWEST_TO_TRUST:
            judged.append((step, correlation))
    trusted = [(step, correlation) for step, correlation in judged if correlation >= TRUSTED_CORRELATION]
    if not judged:
        advice = f"Fewer than {FEWEST_TO_TRUST} trials with both scores (or equal ones): too few to trust halving."
    elif trusted:
        advice = (
            f"From step {trusted[0][0]} on the order is close to the final one: search.halving may be trusted there."
        )
    else:
        step, correlation = max(judged, key=lambda one: one[1])
        advice = (
            f"No intermediate score ranks genomes as the final one does (the best, {correlation:.2f}, after step "
            f"{step}): do not trust search.halving at these steps."
        )
    if any(one.outcome == STOPPED_EARLY for one in evaluations):
        advice += (
            " Halving was on, so only those that it let through are counted: over all genomes it may look different."
        )
    header = ["step", "trials with both", "Spearman with final fitness", "final best quarter in the better half"]
    return [table(header, rows, left=()), advice]


def _kept(step: int, evaluations: Sequence[Evaluation]) -> str:
    """Returns how many of the finally best quarter halving at this step would have let through."""
    both = [one for one in rank_evaluations(evaluations) if step in one.reports]
    half = sorted(both, key=lambda one: one.reports[step], reverse=True)[: math.ceil(len(both) / 2)]
    top = both[: math.ceil(len(both) / 4)]
    return f"{sum(one in half for one in top)} of {len(top)}"


def search_facts(facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    outcomes = count_outcomes(evaluations)
    failures = [f"{n} {outcome}" for outcome, n in outcomes.items() if outcome != Outcome.OK.value]
    seconds = [one.seconds for one in spent_evaluations(evaluations) if one.seconds]
    cost = f"median {median(seconds):.1f} s, total {sum(seconds):.0f} s" if seconds else "not measured"
    hosts = sorted({one.job.partition(":")[0] for one in evaluations if one.job})
    repeated = sum(not one.counts for one in evaluations)
    running = sum(one.outcome == RUNNING and one.counts for one in evaluations)
    rows = [
        ["space", facts.space.describe()],
        ["sampler", f"{facts.sampler}, seed {facts.search_seed}, population {facts.population}"],
        ["budget", f"{facts.trials:,} evaluations of {facts.space.size():,} genomes"],
        ["evaluations", f"{sum(outcomes.values())} done" + (f", {running} still running" if running else "")],
        ["without fitness", ", ".join(failures) or "none"],
        ["repeated proposals", f"{repeated} (known already, not counted)"],
        ["wall time of an evaluation", f"{cost} (job time divided by the genomes of the job, at most {facts.cohort})"],
        ["teacher", facts.teacher],
        ["student", facts.student],
        ["proxy", facts.proxy],
        ["fitness", f"{describe_yardstick(facts.yardstick.scales)}; evaluator {facts.evaluator}"],
        ["measuring the yardstick", f"{facts.yardstick.seconds:.0f} s of jobs, before the first evaluation"],
        ["proxy seeds", ", ".join(map(str, facts.seeds))],
        ["date", _dates(facts, evaluations)],
        ["hosts of the jobs", ", ".join(hosts) or "none"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())],
    ]
    return table(["", ""], rows, left=(0, 1))


def _dates(facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    """Returns when the search began and when its report was written, pauses between its drivers included."""
    begun = min((one.began for one in evaluations if one.began is not None), default=facts.written)
    took = duration_text((facts.written - begun).total_seconds())
    return f"{begun:%Y-%m-%d %H:%M} to {facts.written:%Y-%m-%d %H:%M}, {took} with confirmation and pauses"


def count_outcomes(evaluations: Sequence[Evaluation]) -> Counter[str]:
    return Counter(one.outcome for one in spent_evaluations(evaluations))


def failures(failed: Sequence[Evaluation]) -> list[str]:
    rows = [[str(one.number), one.genome, one.outcome, one.job, one.message] for one in failed[:SHOWN_FAILURES]]
    shown = table(["trial", "genome", "outcome", "job", "message"], rows, left=(1, 2, 3, 4))
    more = len(failed) - SHOWN_FAILURES
    return [shown, *([f"{more} more are in [{LEADERBOARD}]({LEADERBOARD})."] if more > 0 else [])]
