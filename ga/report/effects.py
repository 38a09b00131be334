"""The report's page on which student layer matters: what the effects model (ga/evolution/effects.py) says of a search's
fitness, and of each task that counts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from engine.mapping import SKIP
from engine.records.yardstick import counting_tasks
from ga.evolution.effects import FEWEST, EffectsModel, Estimate, PairEffect
from ga.evolution.genome import Space
from ga.evolution.kept_layers import FOLLOW
from ga.evolution.sampler import parameter_names
from ga.report.facts import Facts
from ga.report.tables import table
from ga.study.evaluations import Evaluation, rank_evaluations

FITNESS = "fitness"
START = " (start)"
"""End of the label of a kept layer's gene."""
SHOWN_PAIRS = 3
TRUSTED_CORRELATION = 0.5

Models = Mapping[str, EffectsModel]
"""Model of the fitness, then of each task that counts, by name."""


def fitted_models(facts: Facts, evaluations: Sequence[Evaluation]) -> dict[str, EffectsModel]:
    """Fits a model to the fitness of finished evaluations, and one to the share of each task's gap that they close;
    none where there are too few evaluations. A single task is the fitness."""
    scored = rank_evaluations(evaluations)
    if len(scored) < FEWEST:
        return {}
    space, scales = facts.space, facts.yardstick.scales
    genomes = [space.parse(one.genome) for one in scored]
    values = {FITNESS: [float(one.fitness or 0.0) for one in scored]}
    tasks = counting_tasks(scales)
    for task in tasks if len(tasks) > 1 else ():
        values[task] = [scales[task].closed_share(one.scores[task]) for one in scored]
    return {name: EffectsModel(genomes, one, space.gene_choices) for name, one in values.items()}


def gene_labels(space: Space) -> list[str]:
    """Returns a name of each gene for readers: `1`, or `1 (hidden states)`."""
    kinds = {"layer": "", "hidden": " (hidden states)", "attention": " (attention)", "init": START}
    parts = (name.rsplit("_", 1) for name in parameter_names(space))
    return [f"{layer}{kinds[kind]}" for kind, layer in parts]


def value_label(value: int) -> str:
    """Returns the name of a gene's value for readers."""
    return {SKIP: "none", FOLLOW: "follow"}.get(value, str(value))


def variance_shares(model: EffectsModel) -> list[float]:
    """Returns the share of each gene in the variance of the model's predictions over all genomes; the rest are pairs.
    All are 0 where it predicts one value."""
    main = [float(np.mean([one.mean**2 for one in effects.values()])) for effects in model.main_effects]
    sizes = [len(values) for values in model.choices]
    pairs = sum(one.estimate.mean**2 / (sizes[one.genes[0]] * sizes[one.genes[1]]) for one in model.pair_effects)
    total = sum(main) + pairs
    return [one / total if total > 0 else 0.0 for one in main]


def which_layer(facts: Facts, models: Models, picture: str) -> list[str]:
    """Returns the whole section; nothing without a model. picture: Markdown of it."""
    if not models:
        return []
    labels = gene_labels(facts.space)
    return [
        "## Which student layer matters",
        finding(models[FITNESS], labels),
        picture,
        _fitness_table(models[FITNESS], labels),
        *(_task_tables(models, labels) if len(models) > 1 else []),
        _pairs_text(models[FITNESS], labels),
        _method(models),
    ]


def finding(model: EffectsModel, labels: Sequence[str]) -> str:
    """Returns the sentence that a reader of one sentence reads."""
    effects, shares = model.main_effects, variance_shares(model)
    clear = [gene for gene, by_value in enumerate(effects) if any(one.is_clear for one in by_value.values())]
    if not clear:
        return (
            f"No teacher layer is clearly better or worse than another for any student layer: {model.evaluations} "
            "evaluations are too few to tell."
        )
    most = max(clear, key=lambda gene: shares[gene])
    best, worst = _best(effects[most]), _worst(effects[most])
    shown = best if effects[most][best].is_clear or not effects[most][worst].is_clear else worst
    text = (
        f"**Student layer {labels[most]} matters most** ({_percent(shares[most])} of what the model predicts): for it, "
        f"{_choice(shown, labels[most])} is worth {_worth(effects[most][shown])} of fitness against its average choice."
    )
    unclear = [label for gene, label in enumerate(labels) if gene not in clear]
    return text + (f" No choice is clearly better or worse for student layer {'; '.join(unclear)}." if unclear else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _choice(value: int, label: str) -> str:
    if label.endswith(START):
        special = {SKIP: "starting at random", FOLLOW: "starting from the layer that it learns from"}
        return special.get(value, f"starting from teacher layer {value}")
    return "learning from none" if value == SKIP else f"learning from teacher layer {value}"


def _best(effects: Mapping[int, Estimate]) -> int:
    return max(effects, key=lambda value: effects[value].mean)


def _worst(effects: Mapping[int, Estimate]) -> int:
    return min(effects, key=lambda value: effects[value].mean)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def _worth(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} (95 % interval {_interval(estimate)})"


def _fitness_table(model: EffectsModel, labels: Sequence[str]) -> str:
    rows = []
    for label, effects, share in zip(labels, model.main_effects, variance_shares(model), strict=True):
        ends = [(value, effects[value]) for value in (_best(effects), _worst(effects))]
        cells = [[value_label(value), f"{one.mean:+.4f}", _interval(one)] for value, one in ends]
        rows.append([label, _percent(share), *itertools.chain(*cells)])
    header = ["student layer", "share", "best from", "effect", "95 % interval", "worst from", "effect", "95 % interval"]
    return table(header, rows, left=(0,))


def _task_tables(models: Models, labels: Sequence[str]) -> list[str]:
    """Compares the tasks: the best teacher layer of each student layer, and how much of the variance it decides."""
    tasks = [name for name in models if name != FITNESS]
    effects = {task: models[task].main_effects for task in tasks}
    shares = {task: variance_shares(models[task]) for task in tasks}
    rows = []
    for gene, label in enumerate(labels):
        cells = []
        for task in tasks:
            best = _best(effects[task][gene])
            one = effects[task][gene][best]
            worth = f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
            cells.append(f"{_percent(shares[task][gene])}; {value_label(best)}: {worth}")
        rows.append([label, *cells])
    return [
        "By task: the share of each student layer, and what its best teacher layer is worth, as a share of the task's "
        "gap (95 % interval).",
        table(["student layer", *tasks], rows, left=tuple(range(len(tasks) + 1))),
    ]


def _pairs_text(model: EffectsModel, labels: Sequence[str]) -> str:
    share = 1.0 - sum(variance_shares(model)) if any(variance_shares(model)) else 0.0
    clear = [one for one in model.pair_effects if one.estimate.is_clear][:SHOWN_PAIRS]
    text = f"Pairs of student layers make {_percent(share)} of what the model predicts"
    if not clear:
        return f"{text}; no single pair is clear."
    return f"{text}; the largest clear ones: {'; '.join(_pair(one, labels) for one in clear)}."


def _pair(pair: PairEffect, labels: Sequence[str]) -> str:
    one, other = (
        f"{labels[gene]} from {value_label(value)}" for gene, value in zip(pair.genes, pair.values, strict=True)
    )
    return f"{one} with {other} {_worth(pair.estimate)}"


def _method(models: Models) -> str:
    known = ", ".join(f"{model.left_out_correlation():.2f} {name}" for name, model in models.items())
    doubt = ""
    if models[FITNESS].left_out_correlation() < TRUSTED_CORRELATION:
        doubt = " **So low a correlation says little: more evaluations, or a proxy with less noise, would.**"
    return (
        "An effect is what a teacher layer is worth to a student layer against the average of its choices, all other "
        "layers averaged over; a share is one of the variance of the predictions over all mappings. Bayesian linear "
        "regression, averaged over priors by their marginal likelihood: the evaluations say how much to shrink. Each "
        "interval holds its effect with a probability of 95 % if the model is right; many are shown, so a few of them "
        "miss. All evaluations share the seeds of the search: the confirmation alone has new ones. "
        f"Fitted to {models[FITNESS].evaluations} evaluations; correlation of a left-out one with what is predicted "
        f"for it: {known}.{doubt}"
    )
