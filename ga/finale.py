"""The end of a search: its report, and the configuration that goes on with its winner."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping

import optuna
from optuna import Study

from ga.best import as_commented_yaml, best_config
from ga.config import SearchConfig
from ga.confirmation import winner
from ga.evolution.genome import Space
from ga.jobs.proxy_facts import ProxyFacts
from ga.report import BEST, REPORT, write_report
from ga.report_text import Facts, headline
from ga.study.evaluations import SEED, Evaluation, evaluation, ranked, read_history
from ga.study.sources import confirmation_name
from ga.study.storage import SearchStorage, hide_password
from ga.study.studies import COMPARABLE, SETTINGS

FOLDER = "report"


def publish(
    config: SearchConfig,
    storage: SearchStorage,
    study: Study,
    space: Space,
    facts: ProxyFacts,
    *,
    say: Callable[[str], None],
) -> None:
    """Writes report/, and says what it found and where that is."""
    evaluations = read_history(study)
    confirmed = confirmed_fitness(storage, config, facts)
    folder = config.root / FOLDER
    best = ranked(evaluations)
    genome = winner(confirmed) if confirmed else best[0].genome if best else None
    report = folder / REPORT
    best_yaml = None
    if genome is not None:
        why = f"Layer mapping {genome}, found by search {config.study!r}: {report} says how sure that is."
        best_yaml = as_commented_yaml(best_config(config, facts, genome), path=folder / BEST, why=why)
    others = comparable_searches(storage, study)
    write_report(folder, report_facts(config, space, facts), evaluations, others, confirmed, best_yaml=best_yaml)
    say(f"\n{headline(report_facts(config, space, facts), evaluations, confirmed)}\n\nreport     {report}")
    if best_yaml is not None:
        say(f"go on      deepspeed launch/distill.py --config {folder / BEST}")


def confirmed_fitness(storage: SearchStorage, config: SearchConfig, facts: ProxyFacts) -> dict[str, dict[int, float]]:
    """genome -> seed -> fitness of the confirmation, as far as there is one."""
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=confirmation_name(config.study, facts.fingerprint))
    except KeyError:
        return {}
    found: dict[str, dict[int, float]] = {}
    for trial in study.get_trials(deepcopy=False):
        fitness = evaluation(trial).fitness
        if fitness is not None:
            found.setdefault(evaluation(trial).genome, {})[int(trial.user_attrs[SEED])] = fitness
    return found


def comparable_searches(storage: SearchStorage, study: Study) -> Mapping[str, list[Evaluation]]:
    """The other searches of the storage with the same proxy over the same kind of models, by name."""
    found: dict[str, list[Evaluation]] = {}
    for other in storage.optuna.get_all_studies():
        same = other.user_attrs.get(COMPARABLE) == study.user_attrs.get(COMPARABLE)
        if other.study_name != study.study_name and SETTINGS in other.user_attrs and same:
            found[other.study_name] = read_history(
                optuna.load_study(storage=storage.optuna, study_name=other.study_name)
            )
    return found


def report_facts(config: SearchConfig, space: Space, facts: ProxyFacts) -> Facts:
    s, proxy = config.search, config.proxy
    student = config.student.path or f"{space.student_layers} layers, init {config.student.init or 'random'}"
    return Facts(
        space=space.describe(),
        space_size=space.size(),
        sampler=s.sampler,
        search_seed=s.seed,
        trials=s.trials,
        population=s.operators.population,
        cohort=s.cohort,
        fingerprint=facts.fingerprint,
        teacher=f"{config.teacher.path}: {space.teacher_layers} layers",
        student=student,
        tasks=facts.tasks,
        evaluator=proxy.evaluator,
        proxy=f"{proxy.steps} steps x {config.train.global_batch} sequences of {facts.seq_len}, {config.data.path}",
        seeds=tuple(range(config.seed, config.seed + proxy.repeats)),
        heuristics={name: space.text(genes) for name, genes in space.heuristics().items()},
        command=shlex.join(["python", *map(hide_password, sys.argv)]),
        second_objective=s.second_objective,
    )
