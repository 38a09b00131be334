"""Searches as Optuna samplers: any study whose objective asks for layer genes can use them.

sampler = GeneticSampler(Space(student_layers=3, teacher_layers=6), seed=0)
study = optuna.create_study(direction="maximize", sampler=sampler)
study.optimize(lambda trial: fitness_of(sampler.genes_of(trial)), n_trials=100)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from ga.evolution.genome import Genes, Space
from ga.evolution.operators import Settings, draw_unseen, next_generation
from ga.optuna_private import given_params, set_study_attr, study_attrs

GENERATION = "mapdistill:generation:"
"""Prefix of the study's system attributes that hold the genomes of a generation, in text form."""


def parameter_names(space: Space) -> list[str]:
    """Returns `layer_1` … `layer_M`; `hidden_1` … and `attention_1` … where the two are searched apart; `init_1` … of
    kept layers."""
    kinds = ["hidden", "attention"] if space.separate_attention else ["layer"]
    kinds = {"mapping": kinds, "layers": ["init"], "both": [*kinds, "init"]}[space.kind]
    return [f"{kind}_{m}" for kind in kinds for m in range(1, space.student_layers + 1)]


def gene_ranges(space: Space) -> dict[str, tuple[int, int]]:
    """Returns the lowest and the highest value of each gene, by name of its parameter."""
    lowest = (values[0] for values in space.gene_choices)
    return {name: (low, space.teacher_layers) for name, low in zip(parameter_names(space), lowest, strict=True)}


def gene_parameters(space: Space, genes: Genes) -> dict[str, int]:
    """Returns the parameters of a genome, for enqueue_trial."""
    return dict(zip(parameter_names(space), genes, strict=True))


def suggest_genes(space: Space, trial: BaseTrial) -> Genes:
    """Asks the trial for one value of each gene; samplers that do not know the space's constraints may leave it."""
    return tuple(trial.suggest_int(name, low, high) for name, (low, high) in gene_ranges(space).items())


class GenomeSampler(BaseSampler):
    """Proposes a genome for each place: the k-th trial that was not enqueued by hand has place k, from 0.

    Numbers of trials are given out by the storage, and enqueued trials are marked when they are made, so that processes
    which ask at the same moment still get different places.
    """

    def __init__(self, space: Space, *, seed: int = 0) -> None:
        self.space = space
        self._seed = seed
        self._independent = RandomSampler(seed=seed)

    @abstractmethod
    def _propose(self, study: Study, place: int, earlier: Sequence[FrozenTrial]) -> Genes:
        """Returns the genome of that place. earlier: the trials with smaller numbers."""

    def genes_of(self, trial: BaseTrial) -> Genes:
        """Asks the trial for its genes (inside an objective)."""
        return suggest_genes(self.space, trial)

    def gene_parameters(self, genes: Genes) -> dict[str, int]:
        """Returns the parameters of a genome, for enqueue_trial."""
        return gene_parameters(self.space, genes)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(low, high) for name, (low, high) in gene_ranges(self.space).items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns the genes of the trial's place. Raises ValueError for a study with several objectives."""
        if len(study.directions) > 1:
            raise ValueError(f"{type(self).__name__} has one objective; use optuna.samplers.NSGAIISampler for several")
        earlier = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        return self.gene_parameters(self._propose(study, count_places(earlier), earlier))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draws the value of a parameter that is no gene."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Leaves genes alone, which are a function of the seed: processes share a storage, not a random state."""
        self._independent.reseed_rng()


def count_places(trials: Sequence[FrozenTrial]) -> int:
    """Returns how many trials the sampler was asked for: all but those that were enqueued by hand."""
    return sum(given_params(trial) is None for trial in trials)


class ExhaustiveSampler(GenomeSampler):
    """The whole space in lexicographic order, then again from its start."""

    def _propose(self, study: Study, place: int, earlier: Sequence[FrozenTrial]) -> Genes:
        return self.space.at(place % self.space.size())


class RandomGenomeSampler(GenomeSampler):
    """The first genomes as given, then random ones, each genome once; with repetition after the last."""

    def __init__(self, space: Space, *, seed: int = 0, first: Sequence[Genes] = ()) -> None:
        super().__init__(space, seed=seed)
        self._order = list(first)
        self._drawn = set(first)
        self._rng = np.random.default_rng(seed)

    def _propose(self, study: Study, place: int, earlier: Sequence[FrozenTrial]) -> Genes:
        if place >= self.space.size():
            return self.space.random(np.random.default_rng([self._seed, place]))
        while len(self._order) <= place:
            genes = draw_unseen(self.space, self._drawn, self._rng)
            self._order.append(genes)
            self._drawn.add(genes)
        return self._order[place]


class GeneticSampler(GenomeSampler):
    """Proposes generation after generation of genomes.

    Generation 0 holds the seeds and random genomes, a later one the children of all that was evaluated before it. It
    is a function of (seed, number of the generation, set of evaluated genomes with their fitness), written to the
    storage when its first genome is asked for, so that every process proposes the same. To make it independent of the
    order in which trials finish, ask for the whole of a generation, finish it, and only then ask for the next one.

    Failed and pruned trials have no fitness: their genomes are neither parents nor proposed again. Trials that were
    enqueued by hand count as evaluated. When every genome of the space has been proposed, random ones are again.
    """

    def __init__(
        self, space: Space, *, settings: Settings | None = None, seed: int = 0, seeds: Sequence[str] = ()
    ) -> None:
        """Reads `seeds`, mappings for generation 0 beside uniform, last, first, all-last and none. Raises UserError
        for one that is outside the space."""
        super().__init__(space, seed=seed)
        self.settings = settings or Settings()
        self._first = space.seeds(seeds)

    def _propose(self, study: Study, place: int, earlier: Sequence[FrozenTrial]) -> Genes:
        number, at = self.generation_and_place(place)
        genomes = self._generation(study, number, earlier)
        if at < len(genomes):
            return genomes[at]
        return self.space.random(np.random.default_rng([self._seed, number, at]))

    def generation_and_place(self, place: int) -> tuple[int, int]:
        """Returns the number of a place's generation, and which of its genomes it is."""
        first = max(self.settings.population, len(self._first))
        if place < first:
            return 0, place
        later, at = divmod(place - first, self.settings.population)
        return later + 1, at

    def _generation(self, study: Study, number: int, earlier: Sequence[FrozenTrial]) -> list[Genes]:
        key = f"{GENERATION}{number}"
        stored = study_attrs(study).get(key)
        if stored is None:
            genomes = self._make(number, self._history(study, earlier))
            set_study_attr(study, key, [self.space.text(genes) for genes in genomes])
            stored = study_attrs(study)[key]  # another process may have been faster
        return [self.space.parse(text) for text in stored]

    def _make(self, number: int, history: Mapping[Genes, float]) -> list[Genes]:
        rng = np.random.default_rng([self._seed, number])
        seeds = [genes for genes in self._first if genes not in history] if number == 0 else []
        count = max(self.settings.population, len(self._first)) if number == 0 else self.settings.population
        known = {**history, **dict.fromkeys(seeds, math.nan)}
        return seeds + next_generation(self.space, known, self.settings, rng, count=count - len(seeds))

    def _history(self, study: Study, trials: Sequence[FrozenTrial]) -> dict[Genes, float]:
        """Returns the mean fitness of every genome that was proposed, larger = better; nan for one without any."""
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        names = parameter_names(self.space)
        values: dict[Genes, list[float]] = defaultdict(list)
        for trial in trials:
            params = trial.params or given_params(trial) or {}
            if all(name in params for name in names):
                found = values[tuple(int(params[name]) for name in names)]
                if trial.state == TrialState.COMPLETE and trial.value is not None:
                    found.append(sign * trial.value)
        return {genes: float(np.mean(sorted(found))) if found else math.nan for genes, found in values.items()}
