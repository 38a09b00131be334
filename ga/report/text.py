"""The Markdown of a search's report."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from engine.mapping import MappingPair
from engine.records.layer_table import layer_name
from engine.records.stats import signal_ratio
from engine.records.yardstick import NOT_A_RESULT, beaten_text, counted, describe_yardstick, is_none
from ga.jobs.outcome import Outcome
from ga.report.confirmation import METHOD, Confirmed, compare, seed_deviation, verdict, winner
from ga.report.layers import KnownLayers
from ga.report.plots import Plot
from ga.study.evaluations import RUNNING, STOPPED_EARLY, Evaluation, correlation_at, evaluated, ranked, report_steps
from ga.study.sources import deepest_layer
from ga.study.yardstick import Measured

LEADERBOARD = "leaderboard.csv"
SHOWN, SHOWN_FAILURES = 10, 20
TRUSTED_CORRELATION, FEWEST_TO_TRUST = 0.8, 10


@dataclass(frozen=True)
class Facts:
    """What was searched, and how."""

    space: str
    space_size: int
    sampler: str
    search_seed: int
    trials: int
    """Budget."""
    population: int
    cohort: int
    fingerprint: str
    teacher: str
    student: str
    tasks: tuple[str, ...]
    """Searched on."""
    yardstick: Measured
    evaluator: str
    proxy: str
    """Steps, batch and text."""
    seeds: tuple[int, ...]
    """Proxy seeds of every evaluation."""
    heuristics: Mapping[str, str]
    """Name -> genome in canonical text; uniform is one of them."""
    command: str
    """What the user typed."""
    second_objective: str | None

    def names(self, genome: str) -> str:
        """Of the heuristics that it equals."""
        return " ".join(name for name, text in self.heuristics.items() if text == genome)

    @property
    def uniform(self) -> str:
        return self.heuristics["uniform"]


def report_text(
    facts: Facts,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    scores: Mapping[str, Confirmed],
    plots: Sequence[Plot],
    *,
    best_yaml: Path,
    layers: Mapping[str, KnownLayers] | None = None,
) -> str:
    """Markdown as GitHub renders it. The second paragraph is the sentence about the winner."""
    parts = ["# Search of layer mappings", headline(facts, evaluations, confirmed)]
    if ranked(evaluations):
        parts += ["## Best genomes", *_best_genomes(facts, evaluations)]
        parts += ["## Confirmation with new seeds", *_confirmation(facts, evaluations, confirmed)] if confirmed else []
        parts += ["## Task by task", *_by_task(facts, confirmed, scores)] if confirmed else []
        parts += _layers(facts, confirmed, layers) if confirmed and layers else []
        parts += ["## What fitness is measured by", *_yardstick(facts)]
        parts += ["## How settled it is", _settled(evaluations, confirmed)]
    parts += [f"![{plot.caption}]({plot.file})" for plot in plots]
    parts += ["## Against other searches", *_other_searches(evaluations, others)] if others else []
    parts += ["## Fitness against depth", *_front(facts, evaluations)] if facts.second_objective else []
    if report_steps(evaluations):
        parts += ["## Intermediate scores", *_intermediate(evaluations)]
    parts += ["## What was searched", _searched(facts, evaluations)]
    failed = [one for one in evaluated(evaluations) if one.fitness is None and one.outcome != STOPPED_EARLY]
    parts += ["## Failed trials", *_failures(failed)] if failed else []
    parts += ["## How to go on", *_go_on(facts, evaluations, confirmed, best_yaml)]
    parts += [
        "## How this was made",
        f"```bash\n{facts.command}\n```",
        f"Fingerprint of the proxy: `{facts.fingerprint}`",
    ]
    return "\n\n".join(parts) + "\n"


def headline(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    best = ranked(evaluations)
    if not best:
        found = ", ".join(f"{n} {outcome}" for outcome, n in _outcomes(evaluations).items())
        return (
            f"No genome has a fitness ({found or 'nothing was evaluated'}): nothing is known about any layer mapping."
        )
    return " ".join(part for part in (_warning(facts, evaluations), _found(facts, evaluations, confirmed)) if part)


def _warning(facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    """Where training with a mapping has not been better than none: there a ranking of mappings means nothing."""
    scales, none = facts.yardstick.scales, dict(facts.yardstick.none)
    scores = {one.genome: one.scores for one in ranked(evaluations) if not is_none(one.genome)}
    said = beaten_text(scores | ({"0": none} if none else {}), scales)
    warning = f"**{said}.**" if said.startswith(NOT_A_RESULT) else ""
    if scales and not counted(scales):
        warning = f"**{NOT_A_RESULT}: fitness is {describe_yardstick(scales)}.** {warning}".strip()
    return warning


def _found(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    best = ranked(evaluations)
    if confirmed:
        return verdict(confirmed, facts.uniform)
    first = best[0]
    uniform = next((one for one in best if one.genome == facts.uniform), None)
    found = f"the best fitness of the search, {first.fitness:.4f}"
    if first is uniform:
        return f"uniform ({facts.uniform}) itself won: it has {found}. It was not confirmed with new seeds."
    above = f", {_minus(first, uniform)} above uniform ({facts.uniform})" if uniform else ""
    return (
        f"{first.genome} has {found}{above}, but it was not confirmed: the best of {len(best)} noisy values is too "
        "high on average. No evidence yet that it is better than uniform; search.confirm_top runs the best again with "
        "new seeds."
    )


def _minus(one: Evaluation, uniform: Evaluation | None) -> str:
    if uniform is None or uniform.fitness is None or one.fitness is None:
        return ""
    return f"{one.fitness - uniform.fitness:.4f}"


def _outcomes(evaluations: Sequence[Evaluation]) -> Counter[str]:
    return Counter(one.outcome for one in evaluated(evaluations))


def _best_genomes(facts: Facts, evaluations: Sequence[Evaluation]) -> list[str]:
    best = ranked(evaluations)
    place = {one.genome: str(i) for i, one in enumerate(best, start=1)}
    uniform = next((one for one in best if one.genome == facts.uniform), None)
    outcome = {one.genome: one.outcome for one in evaluated(evaluations)}
    known = {one.genome: one for one in best}
    rows = []
    for genome in dict.fromkeys([*list(known)[:SHOWN], *facts.heuristics.values()]):
        one = known.get(genome)
        if one is None:
            values = [outcome.get(genome, "not evaluated"), *[""] * (len(facts.tasks) + 2)]
        else:
            scores = [f"{one.scores[task]:.4f}" if task in one.scores else "" for task in facts.tasks]
            values = [f"{one.fitness:.4f}", *scores, _minus(one, uniform), str(one.number)]
        rows.append([place.get(genome, ""), genome, facts.names(genome), *values])
    return [
        f"The {min(SHOWN, len(best))} best of {len(best)} genomes, then the heuristics that are not among them. "
        f"Fitness is what [the yardstick](#what-fitness-is-measured-by) makes of the task scores{_over_seeds(facts)}. "
        f"All are in [{LEADERBOARD}]({LEADERBOARD}).",
        _table(["place", "genome", "heuristic", "fitness", *facts.tasks, "minus uniform", "trial"], rows, left=(1, 2)),
    ]


def _yardstick(facts: Facts) -> list[str]:
    """What each task's scores are measured against, and how far they are trusted."""
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
        _table(header, rows, left=(0,)),
    ]


def _by_task(facts: Facts, confirmed: Confirmed, scores: Mapping[str, Confirmed]) -> list[str]:
    """The winner against uniform, on tasks that were searched on and on those that were not."""
    best = winner(confirmed)
    if best == facts.uniform:
        return ["uniform itself won."]
    rows = []
    for task, by_genome in sorted(scores.items(), key=lambda one: one[0] not in facts.tasks):
        pair = {genome: by_genome[genome] for genome in (best, facts.uniform) if genome in by_genome}
        difference = next(iter(compare(pair, facts.uniform)), None)
        if difference is None or difference.mean is None:
            continue
        means = [f"{fmean(pair[genome].values()):.4f}" for genome in (best, facts.uniform)]
        ends = "" if difference.low is None else f"{difference.low:.4f} to {difference.high:.4f}"
        searched = "yes" if task in facts.tasks else "no"
        rows.append([task, searched, *means, f"{difference.mean:.4f}", ends])
    header = ["task", "searched on", best, f"uniform ({facts.uniform})", "difference", "95 % interval"]
    return [
        "Raw scores with the new seeds. Tasks that were not searched on (proxy.other_tasks) show whether the winner is "
        "better in general, or at these tasks alone.",
        _table(header, rows, left=(0, 1)),
    ]


def _over_seeds(facts: Facts) -> str:
    return f" over {len(facts.seeds)} seeds" if len(facts.seeds) > 1 else ""


def _confirmation(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> list[str]:
    differences = {one.genome: one for one in compare(confirmed, facts.uniform)}
    found = {one.genome: (str(i), f"{one.fitness:.4f}") for i, one in enumerate(ranked(evaluations), start=1)}
    rows = []
    for genome in sorted(confirmed, key=lambda genome: fmean(confirmed[genome].values()), reverse=True):
        values = list(confirmed[genome].values())
        deviation = f"± {stdev(values):.4f}" if len(values) > 1 else ""
        one = differences.get(genome)
        minus = "" if one is None or one.mean is None else f"{one.mean:.4f}"
        ends = "" if one is None or one.low is None else f"{one.low:.4f} to {one.high:.4f}"
        named = [genome, facts.names(genome), *found.get(genome, ("", ""))]
        rows.append([*named, f"{fmean(values):.4f}", deviation, str(len(values)), minus, ends])
    columns = ["genome", "heuristic", "place in the search", "fitness there", "mean", "± std over seeds", "new seeds"]
    table = _table([*columns, "minus uniform", "95 % interval"], rows, left=(0, 1))
    return [
        "Run again with seeds that the search has not seen. The fitness of the search's best is too high on average "
        "because it was picked for it; the means here are not, but for the choice among these few.",
        table,
        METHOD,
    ]


def _layers(facts: Facts, confirmed: Confirmed, layers: Mapping[str, KnownLayers]) -> list[str]:
    """The whole section, of the winner and of uniform; nothing without a table of either."""
    names = {winner(confirmed): "winner", facts.uniform: "uniform"}
    shown = {genome: layers[genome] for genome in names if genome in layers}
    if not shown:
        return []
    by_genome = [one.rows(f"{genome} ({names[genome]})") for genome, one in shown.items()]
    rows = [row for of_layer in zip(*by_genome, strict=True) for row in of_layer]
    teacher = [layer_name(layer) for layer in range(len(rows[0]) - 2)]
    seeds = " and ".join(f"{one.seeds} of {genome}" for genome, one in shown.items())
    return [
        "## Which layers know what",
        "A number is the share of the variance of its column's teacher layer that a linear map of its row's student "
        "layer explains, on text that the map was not fitted on, and an asterisk marks a pair that was trained: "
        "compare the rows of one student layer to see which mapping taught it more, also of teacher layers that it was "
        f"not trained on. It is no part of the fitness. Means over new seeds: {seeds}.",
        _table(["student layer", "mapping", *teacher], rows, left=(0, 1)),
    ]


def _settled(evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    """Seed noise against the spread of fitness."""
    best = ranked(evaluations)
    values = [float(one.fitness or 0.0) for one in best]
    if len(best) < 2:
        return "One genome has a fitness: there is nothing to compare it with."
    top = values[: math.ceil(len(values) / 4)]
    quarter = f" ({stdev(top):.4f} among the best quarter)" if len(top) > 2 else ""
    spread = f"Standard deviation of fitness between the {len(best)} genomes: {stdev(values):.4f}{quarter}."
    repeated = {one.genome: one.by_seed for one in best if len(one.by_seed) > 1}
    table, whose = (repeated, "the search") if repeated else (confirmed, "the confirmation")
    noise = seed_deviation(table)
    if noise is None:
        return f"{spread} The noise between seeds is not known: search.confirm_top or proxy.repeats shows it."
    text = f"{spread} Between seeds of one genome: {noise:.4f}, pooled over {len(table)} genomes of {whose}"
    signal = signal_ratio(table)
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


def _other_searches(evaluations: Sequence[Evaluation], others: Mapping[str, Sequence[Evaluation]]) -> list[str]:
    budget = len(evaluated(evaluations))
    rows = []
    for name, one in [("this search", evaluations), *others.items()]:
        spent = evaluated(one)
        equal, end = ranked(spent[:budget]), ranked(spent)
        cells = [f"{equal[0].fitness:.4f}" if equal else "", f"{end[0].fitness:.4f}" if end else ""]
        rows.append([name, str(len(spent)), *cells, end[0].genome if end else ""])
    header = ["search", "evaluations", f"best of its first {budget}", "best of all", "genome"]
    return [
        "Searches of the same storage with the same proxy and seeds. One run each: which sampler is better in general "
        "takes many.",
        _table(header, rows, left=(0, 4)),
    ]


def _front(facts: Facts, evaluations: Sequence[Evaluation]) -> list[str]:
    front: list[Evaluation] = []
    for one in sorted(ranked(evaluations), key=lambda one: (-float(one.fitness or 0.0), deepest_layer(one.genome))):
        if not front or deepest_layer(one.genome) < deepest_layer(front[-1].genome):
            front.append(one)
    rows = [
        [str(deepest_layer(one.genome)), f"{one.fitness:.4f}", one.genome, facts.names(one.genome)] for one in front
    ]
    return [
        "No genome is better than one of these without a deeper teacher (the teacher stops after the deepest layer "
        "that a mapping names).",
        _table(["deepest teacher layer", "fitness", "genome", "heuristic"], rows, left=(2, 3)),
    ]


def _intermediate(evaluations: Sequence[Evaluation]) -> list[str]:
    """How well an early score ranks the late one."""
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
    return [_table(header, rows, left=()), advice]


def _kept(step: int, evaluations: Sequence[Evaluation]) -> str:
    """How many of the finally best quarter halving at this step would have let through."""
    both = [one for one in ranked(evaluations) if step in one.reports]
    half = sorted(both, key=lambda one: one.reports[step], reverse=True)[: math.ceil(len(both) / 2)]
    top = both[: math.ceil(len(both) / 4)]
    return f"{sum(one in half for one in top)} of {len(top)}"


def _searched(facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    outcomes = _outcomes(evaluations)
    failures = [f"{n} {outcome}" for outcome, n in outcomes.items() if outcome != Outcome.OK.value]
    seconds = [one.seconds for one in evaluated(evaluations) if one.seconds]
    cost = f"median {median(seconds):.1f} s, total {sum(seconds):.0f} s" if seconds else "not measured"
    repeated = sum(not one.counts for one in evaluations)
    running = sum(one.outcome == RUNNING and one.counts for one in evaluations)
    rows = [
        ["space", facts.space],
        ["sampler", f"{facts.sampler}, seed {facts.search_seed}, population {facts.population}"],
        ["budget", f"{facts.trials:,} evaluations of {facts.space_size:,} genomes"],
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
    ]
    return _table(["", ""], rows, left=(0, 1))


def _failures(failed: Sequence[Evaluation]) -> list[str]:
    rows = [[str(one.number), one.genome, one.outcome, one.job, one.message] for one in failed[:SHOWN_FAILURES]]
    table = _table(["trial", "genome", "outcome", "job", "message"], rows, left=(1, 2, 3, 4))
    more = len(failed) - SHOWN_FAILURES
    return [table, *([f"{more} more are in [{LEADERBOARD}]({LEADERBOARD})."] if more > 0 else [])]


def _go_on(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed, best_yaml: Path) -> list[str]:
    best = ranked(evaluations)
    if not best:
        return ["Look into the jobs of the failed trials. The same command goes on."]
    genome = winner(confirmed) if confirmed else best[0].genome
    hidden, attention = MappingPair.genes_in(genome)
    back = "--mapping.hidden uniform" + (" --mapping.attention uniform" if hidden != attention else "")
    advice = f" For uniform in its place add `{back}`." if genome != facts.uniform else ""
    nothing = [
        "The winner lets no layer learn: in so short a proxy, layer losses do not pay against what the student starts "
        "from. Ask again with more proxy.steps, a colder student.init, or search.min_active=1 before a long run."
    ]
    return [
        f"```bash\ndeepspeed launch/distill.py --config {shlex.quote(str(best_yaml))}\n```",
        *(nothing if deepest_layer(genome) == 0 else []),
        f"The search wrote that file with its winner, {genome}: teacher, student, losses and optimizer of the proxy, "
        "and one pass over the corpus at the batch and the learning rate that launch/distill.py has by default."
        f"{advice} A proxy is a proxy: compare the two after the longer run.",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """left: columns aligned to the left; the others hold numbers."""
    rule = [":---" if i in left else "---:" for i in range(len(header))]
    lines = [[_cell(text) for text in header], rule, *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Plain text for a cell: nothing in it is Markdown, and it is one line."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split()))
