"""The report of a search in Markdown: its order, what it says of the winner, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config.places import command
from engine.mapping import MappingPair
from engine.records.columns import counted
from engine.records.yardstick import NOT_A_RESULT, beaten_tasks, counting_tasks, describe_yardstick, is_none
from ga.report.confirmation import Confirmed, verdict, winner
from ga.report.confirmation_sections import confirmation, task_comparison, which_layers
from ga.report.effects import Models, which_layer
from ga.report.facts import Facts
from ga.report.layers import KnownLayers
from ga.report.plots import BEST_SO_FAR, EFFECTS, SEED_NOISE, Plot
from ga.report.search_sections import (
    best_genomes,
    count_outcomes,
    difference_text,
    failures,
    front,
    intermediate_scores,
    other_searches,
    search_facts,
    seed_noise,
    yardstick,
)
from ga.study.evaluations import STOPPED_EARLY, Evaluation, rank_evaluations, report_steps, spent_evaluations
from ga.study.sources import deepest_layer


def report_text(
    facts: Facts,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    scores: Mapping[str, Confirmed],
    plots: Sequence[Plot],
    *,
    best_yaml: Path,
    effects: Models | None = None,
    layers: Mapping[str, KnownLayers] | None = None,
) -> str:
    """Returns Markdown as GitHub renders it. The second paragraph is the finding, the third a picture of it."""
    embedded = {plot.file: f"![{plot.caption}]({plot.file})" for plot in plots}
    parts = [f"# Search of layer mappings: {facts.study}", f"**{headline(facts, evaluations, confirmed)}**"]
    first = next((file for file in (SEED_NOISE, BEST_SO_FAR) if file in embedded), None)
    parts += [] if first is None else [embedded.pop(first)]
    parts += [_summary(facts, evaluations)]
    if rank_evaluations(evaluations):
        parts += ["## Best genomes", *best_genomes(facts, evaluations)]
        if confirmed:
            parts += ["## Confirmation with new seeds", *confirmation(facts, evaluations, confirmed)]
            parts += ["## Task by task", *task_comparison(facts, confirmed, scores)]
            parts += which_layers(facts, confirmed, layers or {})
        parts += which_layer(facts, effects or {}, embedded.pop(EFFECTS, ""))
        parts += ["## What fitness is measured by", *yardstick(facts)]
        parts += ["## How certain the ranking is", seed_noise(evaluations, confirmed)]
    parts += embedded.values()
    parts += ["## Against other searches", *other_searches(evaluations, others)] if others else []
    parts += ["## Fitness against depth", *front(facts, evaluations)] if facts.second_objective else []
    if report_steps(evaluations):
        parts += ["## Intermediate scores", *intermediate_scores(evaluations)]
    parts += ["## What was searched", search_facts(facts, evaluations)]
    failed = [one for one in spent_evaluations(evaluations) if one.fitness is None and one.outcome != STOPPED_EARLY]
    parts += ["## Failed trials", *failures(failed)] if failed else []
    parts += ["## How to go on", *_go_on(facts, evaluations, confirmed, best_yaml)]
    parts += [
        "## How this was made",
        f"```bash\n{facts.command}\n```",
        f"Fingerprint of the proxy: `{facts.fingerprint}`",
    ]
    return "\n\n".join(parts) + "\n"


def headline(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    """Returns the finding: what the winner is worth against uniform, and how sure that is; or that there is none."""
    best = rank_evaluations(evaluations)
    if not best:
        found = ", ".join(f"{n} {outcome}" for outcome, n in count_outcomes(evaluations).items())
        return (
            f"No genome has a fitness ({found or 'nothing was evaluated'}): nothing is known about any layer mapping."
        )
    scales, counting = facts.yardstick.scales, counting_tasks(facts.yardstick.scales)
    if not counting:
        return f"No result: fitness is {describe_yardstick(scales)}."
    scores = {one.genome: one.scores for one in best if not is_none(one.genome)}
    none = {"0": facts.yardstick.none} if facts.yardstick.none else {}
    beaten = beaten_tasks(scores | none, scales) if scores else {}
    if set(counting) <= set(beaten):
        lines = "; ".join(beaten[task] for task in counting)
        return (
            f"No result: on no task that counts does a mapping help ({lines}). The ranking below only orders the "
            "damage; longer training (proxy.steps), a colder start (student.init) or other losses may change that."
        )
    finding = _finding(facts, evaluations, confirmed)
    return f"{finding} {NOT_A_RESULT} for {'; '.join(beaten.values())}." if beaten else finding


def _finding(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> str:
    if confirmed:
        return verdict(confirmed, facts.uniform)
    best = rank_evaluations(evaluations)
    first = best[0]
    uniform = next((one for one in best if one.genome == facts.uniform), None)
    if first is uniform:
        return (
            f"Not confirmed: uniform ({facts.uniform}) itself is best in the search and closes {first.fitness:.4f} of "
            "the gap."
        )
    above = f", {difference_text(first, uniform)} more than uniform ({facts.uniform})" if uniform else ""
    return (
        f"Not confirmed: {first.genome} is best in the search and closes {first.fitness:.4f} of the gap{above}, but "
        f"the best of {len(best)} noisy values is too high on average: no evidence yet that it is better than uniform. "
        "search.confirm_top runs the best again with new seeds."
    )


def _summary(facts: Facts, evaluations: Sequence[Evaluation]) -> str:
    """Returns what was done in one sentence, and where to read on."""
    spent = len(spent_evaluations(evaluations))
    return (
        f"{facts.teacher} to {facts.student}: {counted(spent, 'evaluation')} of {facts.space.size():,} genomes, "
        f"{facts.written:%d %B %Y}. The gap is the one between the untrained student and the teacher, "
        "[on these tasks](#what-fitness-is-measured-by). Read on: [what was searched](#what-was-searched), "
        "[how to go on](#how-to-go-on)."
    )


def _go_on(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed, best_yaml: Path) -> list[str]:
    best = rank_evaluations(evaluations)
    if not best:
        return ["Look into the jobs of the failed trials. The same command continues."]
    genome = winner(confirmed) if confirmed else best[0].genome
    hidden, attention, kept = MappingPair.genes_in(genome)
    back = "--mapping.hidden uniform" + (" --mapping.attention uniform" if hidden != attention else "")
    back += " --student.init uniform" if kept else ""
    advice = f" For uniform in its place add `{back}`." if genome != facts.uniform else ""
    nothing = [
        "The winner lets no layer learn: in so short a proxy, layer losses do not pay against what the student starts "
        "from. Search again with more proxy.steps, a colder student.init, or search.min_active=1 before a long run."
    ]
    return [
        f"```bash\n{command('distill')} --config {shlex.quote(str(best_yaml))}\n```",
        *(nothing if deepest_layer(genome) == 0 else []),
        f"The search wrote that file with its winner, {genome}: teacher, student, losses and optimizer of the proxy, "
        "and one pass over the corpus at the batch and the learning rate that launch/distill.py has by default."
        f"{advice} A proxy is a proxy: compare the two after the longer run.",
    ]
