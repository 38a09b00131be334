"""The report's sections on the best genomes, run again with new seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from engine.records.layer_table import layer_name
from ga.report.confirmation import METHOD, Confirmed, compare, winner
from ga.report.facts import Facts
from ga.report.layers import KnownLayers
from ga.report.tables import table
from ga.study.evaluations import Evaluation, rank_evaluations


def confirmation(facts: Facts, evaluations: Sequence[Evaluation], confirmed: Confirmed) -> list[str]:
    differences = {one.genome: one for one in compare(confirmed, facts.uniform)}
    found = {one.genome: (str(i), f"{one.fitness:.4f}") for i, one in enumerate(rank_evaluations(evaluations), start=1)}
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
    shown = table([*columns, "minus uniform", "95 % interval"], rows, left=(0, 1))
    return [
        "Run again with seeds that the search has not seen. The fitness of the search's best is too high on average "
        "because it was picked for it; the means here are not, but for the choice among these few.",
        shown,
        METHOD,
    ]


def task_comparison(facts: Facts, confirmed: Confirmed, scores: Mapping[str, Confirmed]) -> list[str]:
    """Compares the winner with uniform, on tasks that were searched on and on those that were not."""
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
        table(header, rows, left=(0, 1)),
    ]


def which_layers(facts: Facts, confirmed: Confirmed, layers: Mapping[str, KnownLayers]) -> list[str]:
    """Returns the whole section, of the winner and of uniform; nothing without a table of either."""
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
        table(["student layer", "mapping", *teacher], rows, left=(0, 1)),
    ]
