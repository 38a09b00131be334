"""Where the next genome comes from: a sampler for the search, a fixed list for the confirmation of its winners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from engine.mapping import MappingPair
from ga.config import SearchSection
from ga.evolution.genome import Space
from ga.evolution.operators import draw_unseen
from ga.evolution.sampler import (
    ExhaustiveSampler,
    GeneticSampler,
    RandomGenomeSampler,
    count_places,
    gene_parameters,
    suggest_genes,
)
from ga.optuna_private import given_params
from ga.study.evaluations import REPEATED, read_evaluation

REPEATS_IN_A_ROW = 25
"""Proposals of known genomes after which a sampler gets a random unknown one instead."""
LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Proposal:
    """What a trial stands for."""

    genome: str
    seed: int
    """First seed of the proxy."""
    generation: int | None = None


class Source(Protocol):
    """What a ledger asks for trials. Every method is called while the storage is locked."""

    study: Study
    tries_again: bool
    """Whether a genome that another trial has failed with is evaluated, or has failed, too."""

    def may_ask(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tells whether a trial more may be asked for now."""
        ...

    def is_over(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tells whether no trial will be asked for any more, as things are."""
        ...

    def before_ask(self, trials: Sequence[FrozenTrial]) -> None:
        """Prepares the study for the next question."""
        ...

    def batch(self, trials: Sequence[FrozenTrial]) -> int:
        """Returns how many trials may be worked on side by side."""
        ...

    def proposal(self, trial: optuna.Trial) -> Proposal:
        """Returns what a trial stands for: the same each time it is called for it, also by another process."""
        ...

    def objectives(self, genome: str, fitness: float) -> list[float]:
        """Returns what Optuna is told of a genome with that fitness."""
        ...


class SearchSource:
    """The genomes that a sampler proposes until the budget is spent."""

    tries_again = False

    def __init__(self, study: Study, space: Space, settings: SearchSection, *, proxy_seed: int) -> None:
        """Replaces the sampler of `study`. Call `start` once before the first trial."""
        self.study, self.space, self.settings = study, space, settings
        self._proxy_seed = proxy_seed
        self.sampler = study.sampler = build_sampler(space, settings)

    def start(self) -> None:
        """Queues the heuristics of samplers that do not know them."""
        if isinstance(self.sampler, optuna.samplers.TPESampler | optuna.samplers.NSGAIISampler):
            for genes in self.space.seeds(self.settings.seeds):
                self.study.enqueue_trial(gene_parameters(self.space, genes), skip_if_exists=True)

    def is_over(self, trials: Sequence[FrozenTrial]) -> bool:
        counted = [read_evaluation(trial) for trial in trials if trial.state != TrialState.WAITING]
        counted = [one for one in counted if one.counts]
        genomes = {one.genome for one in counted if one.genome}
        return len(counted) >= self.settings.trials or len(genomes) >= self.space.size()

    def may_ask(self, trials: Sequence[FrozenTrial]) -> bool:
        if self.is_over(trials):
            return False
        if isinstance(self.sampler, GeneticSampler) and self.sampler.generation_and_place(count_places(trials))[1] == 0:
            return all(trial.state != TrialState.RUNNING for trial in trials)  # children of a whole generation
        return True

    def before_ask(self, trials: Sequence[FrozenTrial]) -> None:
        """Queues something new where a sampler has been proposing nothing new for a while."""
        last = [read_evaluation(trial) for trial in trials if trial.state.is_finished()][-REPEATS_IN_A_ROW:]
        if len(last) < REPEATS_IN_A_ROW or any(one.outcome != REPEATED for one in last):
            return
        known = {self.space.parse(read_evaluation(trial).genome) for trial in trials if read_evaluation(trial).genome}
        rng = np.random.default_rng([self.settings.seed, len(trials)])
        self.study.enqueue_trial(gene_parameters(self.space, draw_unseen(self.space, known, rng)))

    def batch(self, trials: Sequence[FrozenTrial]) -> int:
        finished = sum(trial.state.is_finished() and read_evaluation(trial).counts for trial in trials)
        left = self.settings.trials - finished
        return min(left, self.sampler.settings.population) if isinstance(self.sampler, GeneticSampler) else left

    def proposal(self, trial: optuna.Trial) -> Proposal:
        genes = self.space.repair(suggest_genes(self.space, trial))
        return Proposal(self.space.text(genes), self._proxy_seed, self._generation(trial))

    def _generation(self, trial: optuna.Trial) -> int | None:
        if not isinstance(self.sampler, GeneticSampler):
            return None
        earlier = [other for other in self.study.get_trials(deepcopy=False) if other.number < trial.number]
        return self.sampler.generation_and_place(count_places(earlier))[0]

    def objectives(self, genome: str, fitness: float) -> list[float]:
        if self.settings.second_objective is None:
            return [fitness]
        return [fitness, float(deepest_layer(genome))]


def deepest_layer(genome: str) -> int:
    """Returns the teacher layer after which a teacher that serves this mapping can stop; 0: none is needed."""
    hidden, attention, _ = MappingPair.genes_in(genome)
    return max(hidden + attention)


def build_sampler(space: Space, settings: SearchSection) -> optuna.samplers.BaseSampler:
    """Builds the sampler that the settings name, with the heuristics as its first genomes where it takes any."""
    seeds = space.seeds(settings.seeds)
    if settings.sampler == "ga":
        return GeneticSampler(space, settings=settings.operators, seed=settings.seed, seeds=settings.seeds)
    if settings.sampler == "random":
        return RandomGenomeSampler(space, seed=settings.seed, first=seeds)
    if settings.sampler == "exhaustive":
        return ExhaustiveSampler(space)
    if settings.sampler == "tpe":
        # several trials run at once, and none of them may draw the others to itself
        return optuna.samplers.TPESampler(seed=settings.seed, constant_liar=True)
    return optuna.samplers.NSGAIISampler(seed=settings.seed, population_size=20)


class ListSource:
    """Genomes and seeds from a list: what `add` has queued."""

    tries_again = True

    def __init__(self, study: Study, space: Space) -> None:
        self.study, self.space = study, space

    def add(self, genome: str, seed: int) -> None:
        """Queues a pair, unless it is there already; one that has failed is queued again: whoever asks again wants it
        to be tried. Call it while the storage is locked."""
        params = {**gene_parameters(self.space, self.space.parse(genome)), "seed": seed}
        trials = self.study.get_trials(deepcopy=False)
        # Optuna's own skip_if_exists takes seeds from 100,000 on for the same when they are near
        if not any(given_params(t) == params and t.state != TrialState.FAIL for t in trials):
            self.study.enqueue_trial(params)

    def is_over(self, trials: Sequence[FrozenTrial]) -> bool:
        return all(trial.state != TrialState.WAITING for trial in trials)

    def may_ask(self, trials: Sequence[FrozenTrial]) -> bool:
        return not self.is_over(trials)

    def before_ask(self, trials: Sequence[FrozenTrial]) -> None: ...

    def batch(self, trials: Sequence[FrozenTrial]) -> int:
        return sum(not trial.state.is_finished() for trial in trials)

    def proposal(self, trial: optuna.Trial) -> Proposal:
        genome = self.space.text(suggest_genes(self.space, trial))
        return Proposal(genome, trial.suggest_int("seed", 0, LARGEST_SEED))

    def objectives(self, genome: str, fitness: float) -> list[float]:
        return [fitness]


def confirmation_name(study: str, fingerprint: str) -> str:
    """Returns the name of the study that holds it; another proxy has another."""
    return f"{study} (confirmation, proxy {fingerprint})"
