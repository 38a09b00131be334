"""The yardstick of a search: the mappings that people guess are distilled with several seeds before anything else, and
tell how far each task can be trusted. They are trials of a study of their own, which all searches of a storage with the
same proxy share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from optuna import Study
from optuna.trial import TrialState

from engine.mapping import MappingPair
from engine.records.yardstick import Noise, TaskScale, Yardstick, fitness_of, is_none, noise_of, weighted_scales
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.evaluations import BASELINES, SECONDS, SEED, Evaluation, read_evaluation

KEPT = "yardstick"
"""User attribute of a search's study."""
GENOMES = ("uniform", "last", "first", "all-last", "none")


@dataclass(frozen=True)
class Measured:
    """What a search measures its genomes by, fixed at its start."""

    scales: Yardstick
    noise: Mapping[str, Noise]
    """Noise by task; empty where too few of the genomes got a score."""
    none: Mapping[str, float]
    """Score of the student whose layers learn from none, by task; empty where it got none."""
    seconds: float
    """Seconds of jobs that measuring it took."""

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Measured:
        """Reads the study's attribute."""
        return cls(
            scales={task: TaskScale(**scale) for task, scale in kept["scales"].items()},
            noise={task: Noise(**noise) for task, noise in kept["noise"].items()},
            none=kept["none"],
            seconds=kept["seconds"],
        )

    def kept(self) -> dict[str, Any]:
        return asdict(self)


def given_yardstick(config: SearchConfig) -> Measured | None:
    """Returns the user's own yardstick; None: it has to be measured."""
    return Measured(config.proxy.yardstick, {}, {}, 0.0) if config.proxy.yardstick else None


def yardstick_name(fingerprint: str, seed: int) -> str:
    """Returns the name of the study that measures it."""
    return f"yardstick of proxy {fingerprint}, seed {seed}"


def yardstick_seeds(config: SearchConfig) -> range:
    """Returns the seeds that it is measured with: those of the search's own evaluations, and at least two."""
    return range(config.seed, config.seed + max(2, config.proxy.repeats))


def yardstick_space(space: Space) -> Space:
    """Returns the space of the genomes of every yardstick, whatever the search may propose."""
    return Space(student_layers=space.student_layers, teacher_layers=space.teacher_layers)


def yardstick_genomes(space: Space) -> list[str]:
    """Returns the genomes that it is measured with, in canonical text. A student with more layers than its teacher
    has no `last` and no `first`."""
    sizes = {"student_layers": space.student_layers, "teacher_layers": space.teacher_layers}
    narrow = space.student_layers > space.teacher_layers
    names = [name for name in GENOMES if not (narrow and name in ("last", "first"))]
    return list(dict.fromkeys(str(MappingPair.parse(name, **sizes, key="yardstick")) for name in names))


def measure_yardstick(study: Study, seeds: Container[int]) -> Measured | None:
    """Returns what the finished trials of its study say with these seeds (searches with more repeats add others);
    None when no genome got a score."""
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if int(trial.user_attrs[SEED]) in seeds
    ]
    if not trials:
        return None
    scales = {
        task: TaskScale(
            start=fmean(trial.user_attrs[BASELINES][task]["start"] for trial in trials),
            teacher=fmean(trial.user_attrs[BASELINES][task]["teacher"] for trial in trials),
        )
        for task in trials[0].user_attrs[BASELINES]
    }
    scales = {task: replace(one, weight=float(one.teacher > one.start)) for task, one in scales.items()}
    scores: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))  # task, genome, seed
    for trial in trials:
        one = read_evaluation(trial)
        for task in scales:
            scores[task][one.genome][int(trial.user_attrs[SEED])] = one.scores[task]
    mapped = {genome: seeds for genome, seeds in scores[next(iter(scales))].items() if not is_none(genome)}
    noise: dict[str, Noise] = {}
    if len(mapped) > 1 and any(len(seeds) > 1 for seeds in mapped.values()):
        noise = {task: noise_of({genome: scores[task][genome] for genome in mapped}) for task in scales}
        scales = weighted_scales(scales, noise)
    none = next((genome for genome in scores[next(iter(scales))] if is_none(genome)), None)
    return Measured(
        scales=scales,
        noise=noise,
        none={} if none is None else {task: fmean(scores[task][none].values()) for task in scales},
        seconds=sum(trial.user_attrs.get(SECONDS) or 0.0 for trial in trials),
    )


def reusable_evaluations(study: Study, found: Measured, seeds: Sequence[int]) -> dict[str, Evaluation]:
    """Returns by genome the evaluations that a search with these seeds need not repeat."""
    by_genome: dict[str, dict[int, Evaluation]] = defaultdict(dict)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        by_genome[read_evaluation(trial).genome][int(trial.user_attrs[SEED])] = read_evaluation(trial)
    known = {}
    for genome, by_seed in by_genome.items():
        if not all(seed in by_seed for seed in seeds):
            continue
        fitness = {seed: fitness_of(by_seed[seed].scores, found.scales) for seed in seeds}
        scores = {task: fmean(by_seed[seed].scores[task] for seed in seeds) for task in found.scales}
        mean = fmean(fitness.values())
        known[genome] = replace(by_seed[seeds[0]], fitness=mean, by_seed=fitness, scores=scores, reports={})
    return known
