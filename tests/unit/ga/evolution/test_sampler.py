"""The genetic algorithm inside Optuna: what it proposes, and that nothing but seed and history decides it."""

from __future__ import annotations

import random
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from engine.errors import UserError
from ga.evolution.genome import Genes, Space
from ga.evolution.operators import Settings
from ga.evolution.sampler import GeneticSampler

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = Space(student_layers=4, teacher_layers=12)
SETTINGS = Settings(population=8)


def study_of(sampler: GeneticSampler, storage: str | None = None, direction: str = "maximize") -> optuna.Study:
    return optuna.create_study(
        study_name="s", direction=direction, sampler=sampler, storage=storage, load_if_exists=True
    )


def closeness(genes: Genes) -> float:
    """Best at 0-5-0-10."""
    return -sum((g - want) ** 2 for g, want in zip(genes, (0, 5, 0, 10), strict=True)) / 144


def generation(study: optuna.Study, sampler: GeneticSampler, count: int) -> list[tuple[optuna.Trial, Genes]]:
    trials = [study.ask() for _ in range(count)]
    return [(trial, sampler.genes_of(trial)) for trial in trials]


def test_generation_0_holds_the_presets_and_the_given_seeds() -> None:
    sampler = GeneticSampler(SPACE, settings=SETTINGS, seeds=["0-0-5-10"])
    study = study_of(sampler)
    genomes = [genes for _, genes in generation(study, sampler, 8)]
    presets = [(3, 6, 9, 12), (9, 10, 11, 12), (1, 2, 3, 4), (12, 12, 12, 12), (0, 0, 0, 0), (0, 0, 5, 10)]
    assert genomes[:6] == presets
    assert len(set(genomes)) == 8
    with pytest.raises(UserError, match="5-5-5-99"):
        GeneticSampler(SPACE, seeds=["5-5-5-99"])


def test_the_next_generation_depends_neither_on_the_order_of_finishing_nor_on_the_process(tmp_path: Path) -> None:
    proposals = []
    for order in (0, 1):
        sampler = GeneticSampler(SPACE, settings=SETTINGS, seed=7)
        storage = f"sqlite:///{tmp_path}/{order}.db"
        study = study_of(sampler, storage)
        for _ in range(3):
            pending = generation(study, sampler, 8)
            random.Random(order).shuffle(pending)
            for trial, genes in pending:
                study.tell(trial, closeness(genes))
        # a process that knows nothing but the storage goes on
        later = GeneticSampler(SPACE, settings=SETTINGS, seed=7)
        again = study_of(later, storage)
        mine, theirs = generation(study, sampler, 4), generation(again, later, 4)
        proposals.append([genes for _, genes in [*mine, *theirs]])
    assert proposals[0] == proposals[1]
    assert len(set(proposals[0])) == 8


def test_another_seed_is_another_search() -> None:
    found = []
    for seed in (0, 1):
        sampler = GeneticSampler(SPACE, settings=SETTINGS, seed=seed)
        found.append([genes for _, genes in generation(study_of(sampler), sampler, 8)])
    assert found[0][:5] == found[1][:5]
    assert found[0][5:] != found[1][5:]


def test_no_genome_is_proposed_twice_and_failures_have_no_children() -> None:
    sampler = GeneticSampler(SPACE, settings=SETTINGS)
    study = study_of(sampler)
    seen: set[Genes] = set()
    for _ in range(6):
        for trial, genes in generation(study, sampler, 8):
            assert genes not in seen
            seen.add(genes)
            if genes[0] > 0:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, closeness(genes))


def test_it_climbs() -> None:
    best = []
    for seed in range(10):
        sampler = GeneticSampler(SPACE, settings=Settings(), seed=seed)
        study = study_of(sampler)
        study.optimize(lambda trial, sampler=sampler: closeness(sampler.genes_of(trial)), n_trials=200)
        best.append(study.best_value)
    assert sum(value > -0.02 for value in best) >= 8, best  # within 3 squared layers of the optimum


def test_minimising_is_maximising_the_negative() -> None:
    values = []
    for direction, sign in (("maximize", 1), ("minimize", -1)):
        sampler = GeneticSampler(SPACE, settings=SETTINGS)
        study = study_of(sampler, direction=direction)
        study.optimize(lambda trial, s=sampler, sign=sign: sign * closeness(s.genes_of(trial)), n_trials=40)
        values.append([trial.params for trial in study.trials])
    assert values[0] == values[1]


def test_an_enqueued_genome_is_evaluated_and_never_proposed_again() -> None:
    sampler = GeneticSampler(SPACE, settings=SETTINGS)
    study = study_of(sampler)
    study.enqueue_trial(sampler.gene_parameters((3, 6, 9, 12)))
    (first, genes), *rest = generation(study, sampler, 9)
    assert genes == (3, 6, 9, 12)
    assert [other for _, other in rest].count((3, 6, 9, 12)) == 0
    assert rest[0][1] == (9, 10, 11, 12), "the enqueued one takes no place in the generation"
    study.tell(first, 1.0)


def test_a_space_smaller_than_the_budget_is_used_up_first() -> None:
    space = Space(student_layers=2, teacher_layers=2)
    sampler = GeneticSampler(space, settings=Settings(population=4))
    study = study_of(sampler)
    study.optimize(lambda trial: float(sum(sampler.genes_of(trial))), n_trials=16)
    genomes = [tuple(trial.params.values()) for trial in study.trials]
    assert set(genomes) == set(space)
    assert set(genomes[9:]) <= set(space)


def test_hidden_and_attention_genes_and_other_parameters_go_together() -> None:
    space = Space(student_layers=2, teacher_layers=6, separate_attention=True)
    sampler = GeneticSampler(space, settings=Settings(population=6))
    study = study_of(sampler)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-3, log=True)
        return sum(sampler.genes_of(trial)) * lr

    study.optimize(objective, n_trials=12)
    assert set(study.trials[0].params) == {"lr", "hidden_1", "hidden_2", "attention_1", "attention_2"}
    assert len({trial.params["lr"] for trial in study.trials}) == 12


def test_several_objectives_are_refused() -> None:
    sampler = GeneticSampler(SPACE)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    with pytest.raises(ValueError, match="NSGAIISampler"):
        sampler.genes_of(study.ask())
