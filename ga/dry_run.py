"""What a search will do and cost: its banner, and the estimate of --dry_run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from engine.jobs.proxy.facts import ProxyFacts
from engine.records.columns import counted, duration_text, labelled_lines
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.jobs.slots import Placement
from ga.study.evaluations import Evaluation, read_history, spent_evaluations
from ga.study.sources import SearchSource


def describe_search(
    config: SearchConfig,
    space: Space,
    facts: ProxyFacts,
    placements: Sequence[Placement],
    evaluations: Sequence[Evaluation],
) -> str:
    """Returns the banner."""
    s, proxy = config.search, config.proxy
    done = len(spent_evaluations(evaluations))
    how = "after fine-tuning" if proxy.evaluator == "finetune" else "without fine-tuning"
    rows: list[tuple[str, str | list[str]]] = [
        ("search", f"{config.study}: {s.sampler}, seed {s.seed}"),
        ("space", space.describe()),
        ("budget", counted(s.trials, "evaluation") + (f", {done} done already" if done else "")),
        (
            "proxy",
            f"{config.teacher.path}: {proxy.steps} steps x {config.train.global_batch} sequences of {facts.seq_len} of "
            f"{config.data.path}",
        ),
        (
            "fitness",
            f"share of the gap from untrained student to teacher, {', '.join(facts.tasks)} {how}, "
            f"weights {'given' if proxy.yardstick else 'measured first'}; {counted(proxy.repeats, 'seed')} from "
            f"{config.seed}",
        ),
        ("slots", [f"{one}, up to {counted(s.cohort, 'genome')} a job" for one in placements]),
        ("output", config.output_dir),
    ]
    if s.sampler == "ga":
        operators = f"{s.operators.selection} selection, {s.operators.crossover} crossover"
        if s.operators.prerank > 1:
            operators += f", the best of {s.operators.prerank} times as many offspring by the effects model"
        rows.insert(3, ("generations", f"of {s.operators.population}: {operators}"))
    return labelled_lines(rows + [("note", text) for text in notes(config, space, placements)]) + "\n"


def notes(config: SearchConfig, space: Space, placements: Sequence[Placement]) -> list[str]:
    """Returns what a user would want to know before a long search."""
    s, found = config.search, []
    if space.size() <= s.trials and s.sampler != "exhaustive":
        found.append(
            f"the space has {space.size():,} genomes, no more than the budget of {s.trials}: --search.sampler "
            "exhaustive evaluates them all"
        )
    side_by_side = s.cohort * len(placements)
    if s.sampler == "ga" and s.operators.population < len(placements):
        found.append(
            f"a generation of {s.operators.population} leaves {len(placements) - s.operators.population} of "
            f"{len(placements)} slots idle; search.population={side_by_side} would fill them"
        )
    if s.confirm_top == 0:
        found.append("search.confirm_top=0: the report cannot tell the winner from seed noise")
    return found


def estimate(
    config: SearchConfig,
    source: SearchSource,
    paid: Sequence[Evaluation],
    placements: Sequence[Placement],
    *,
    of_yardstick: int,
) -> str:
    """Returns what the whole search will take, after evaluations that have cost something. of_yardstick: how many of
    them measuring the yardstick still needs."""
    s, slots = config.search, len(placements)
    first = [one for one in paid if one.job == paid[0].job]
    each = fmean(one.seconds or 0.0 for one in paid)
    left = s.trials - len(spent_evaluations(read_history(source.study)))
    batch = max(1, source.batch(source.study.get_trials(deepcopy=False)))
    size = min(s.cohort, math.ceil(batch / slots))
    rounds = math.ceil(math.ceil(batch / size) / slots)  # of a generation; the other samplers have one
    total = each * size * rounds * left / batch
    confirmation = each * s.confirm_seeds * (s.confirm_top + 1) / slots
    seconds, names = sum(one.seconds or 0.0 for one in first), " ".join(one.genome for one in first)
    rows = [
        ("measured", f"{seconds:.0f} s for a job of {len(first)}: {names} ({first[0].job})"),
        (
            "estimate",
            f"{each:.1f} s per evaluation; {left} on {counted(slots, 'slot')} take {duration_text(total)}, the "
            f"yardstick before them about {duration_text(each * of_yardstick / slots)}, the confirmation about "
            f"{duration_text(confirmation)}",
        ),
    ]
    return labelled_lines(rows)
