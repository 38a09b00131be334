"""The end of a search: a folder with REPORT.md, leaderboard.csv, pictures, and best.yaml, the configuration of a whole
distillation with the winner."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import optuna
from optuna import Study
from optuna.trial import FrozenTrial

from engine.config.distill import DataConfig, MappingConfig, RunConfig, StudentConfig, TrainConfig
from engine.config.places import command
from engine.jobs.proxy.facts import ProxyFacts
from engine.mapping import MappingPair
from engine.records.files import replaced
from engine.records.run_dir import as_yaml
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.report.confirmation import Confirmed, winner
from ga.report.effects import fitted_models
from ga.report.facts import Facts, report_facts
from ga.report.layers import KnownLayers, known_layers
from ga.report.plots import draw_all
from ga.report.search_sections import LEADERBOARD
from ga.report.text import headline, report_text
from ga.study.evaluations import SEED, Evaluation, rank_evaluations, read_evaluation, read_history, spent_evaluations
from ga.study.proxy_identity import proxy_of
from ga.study.sources import confirmation_name
from ga.study.storage import SearchStorage
from ga.study.studies import comparable_searches
from ga.study.yardstick import Measured

REPORT, BEST = "REPORT.md", "best.yaml"


def write_report(
    folder: Path,
    facts: Facts,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    scores: Mapping[str, Confirmed],
    *,
    best_yaml: str | None = None,
    layers: Mapping[str, KnownLayers] | None = None,
) -> Path:
    """Returns the path of REPORT.md. `folder` is replaced as a whole, with all that was in it. One writer at a time.

    others: other searches with the same proxy. confirmed: genome -> seed -> fitness. scores: the same of each task, and
    of tasks that were not searched on. best_yaml: text of that file; None: there is no winner. layers: of confirmed
    genomes.
    """
    confirmed = {genome: by_seed for genome, by_seed in confirmed.items() if by_seed}
    effects = fitted_models(facts, evaluations)
    with replaced(folder) as draft:
        plots = draw_all(draft, facts, evaluations, others, confirmed, effects)
        write_leaderboard(draft / LEADERBOARD, facts, evaluations)
        text = report_text(
            facts,
            evaluations,
            others,
            confirmed,
            scores,
            plots,
            best_yaml=folder / BEST,
            effects=effects,
            layers=layers,
        )
        (draft / REPORT).write_text(text, encoding="utf-8")
        if best_yaml is not None:
            (draft / BEST).write_text(best_yaml, encoding="utf-8")
    return folder / REPORT


def write_leaderboard(path: Path, facts: Facts, evaluations: Sequence[Evaluation]) -> None:
    """Writes all that is over: ranked genomes, then those without fitness in the order of trials."""
    spent = spent_evaluations(evaluations)
    best = rank_evaluations(spent)
    rows = [*enumerate(best, start=1), *(("", one) for one in spent if one.fitness is None)]
    seeds = sorted({seed for one in spent for seed in one.by_seed})
    steps = sorted({step for one in spent for step in one.reports})
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["rank", "genome", "heuristics", "fitness", *facts.tasks]
            + [f"fitness_seed_{seed}" for seed in seeds]
            + [f"fitness_step_{step}" for step in steps]
            + ["outcome", "generation", "trial", "seconds", "cohort", "job", "message"]
        )
        for rank, one in rows:
            table.writerow(
                [rank, one.genome, facts.names(one.genome), one.fitness]
                + [one.scores.get(task) for task in facts.tasks]
                + [one.by_seed.get(seed) for seed in seeds]
                + [one.reports.get(step) for step in steps]
                + [one.outcome, one.generation, one.number, one.seconds, one.cohort, one.job, one.message]
            )


def best_config(config: SearchConfig, facts: ProxyFacts, genome: str) -> RunConfig:
    """Returns the configuration of a whole distillation: teacher, student, losses and optimizer of the proxy; one
    pass over the corpus at launch/distill.py's own batch and learning rate."""
    sizes = {"student_layers": facts.student_layers, "teacher_layers": facts.teacher_layers}
    pair = MappingPair.parse(genome, **sizes, key="genome")
    student = {one.name: getattr(config.student, one.name) for one in fields(StudentConfig)}
    if pair.kept is not None:
        student["init"] = pair.kept
    train = TrainConfig()
    held_out = DataConfig.eval_sequences
    steps = max(1, (facts.sequences - held_out) // train.global_batch)
    return RunConfig(
        output_dir=str(config.root / "best"),
        seed=config.seed,
        allow_pickle=config.allow_pickle,
        teacher=config.teacher,
        student=StudentConfig(**student),
        mapping=MappingConfig(hidden=str(pair.hidden), attention=str(pair.attention) if pair.separate else None),
        loss=config.loss,
        data=replace(config.data, eval_sequences=held_out),
        optim=config.optim,
        kernels=config.kernels,
        train=replace(train, steps=steps),
    )


def as_commented_yaml(config: RunConfig, *, path: Path, why: str) -> str:
    """Returns the text of that file. why: comment at the top."""
    return f"# {why}\n# {command('distill')} --config {shlex.quote(str(path))}\n{as_yaml(config)}"


FOLDER = "report"


def publish(
    config: SearchConfig,
    storage: SearchStorage,
    study: Study,
    space: Space,
    facts: ProxyFacts,
    yardstick: Measured,
    *,
    say: Callable[[str], None],
) -> None:
    """Writes report/, and says what it found and where that is."""
    evaluations = read_history(study)
    confirmations = read_confirmations(storage, config, facts)
    confirmed, scores = confirmed_fitness(confirmations)
    folder = config.root / FOLDER
    best = rank_evaluations(evaluations)
    genome = winner(confirmed) if confirmed else best[0].genome if best else None
    report = folder / REPORT
    best_yaml = None
    if genome is not None:
        why = f"Layer mapping {genome}, found by search {config.study!r}: {report} says how sure that is."
        best_yaml = as_commented_yaml(best_config(config, facts, genome), path=folder / BEST, why=why)
    others = comparable_searches(storage, study)
    about = report_facts(config, space, facts, yardstick, proxy_of(study))
    layers = known_layers(map(read_evaluation, confirmations), config.loss)
    write_report(folder, about, evaluations, others, confirmed, scores, best_yaml=best_yaml, layers=layers)
    say(f"\n{headline(about, evaluations, confirmed)}\n\nreport     {report}")
    if best_yaml is not None:
        say(f"go on      {command('distill')} --config {folder / BEST}")


def read_confirmations(storage: SearchStorage, config: SearchConfig, facts: ProxyFacts) -> list[FrozenTrial]:
    """Returns the trials of the confirmation, as far as there is one."""
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=confirmation_name(config.study, facts.fingerprint))
    except KeyError:
        return []
    return study.get_trials(deepcopy=False)


def confirmed_fitness(
    trials: Sequence[FrozenTrial],
) -> tuple[dict[str, dict[int, float]], dict[str, dict[str, dict[int, float]]]]:
    """Returns the fitness of the confirmation by genome and seed, and its scores by task, genome and seed."""
    found: dict[str, dict[int, float]] = {}
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for trial in trials:
        one = read_evaluation(trial)
        if one.fitness is not None:
            seed = int(trial.user_attrs[SEED])
            found.setdefault(one.genome, {})[seed] = one.fitness
            for task, score in one.scores.items():
                scores.setdefault(task, {}).setdefault(one.genome, {})[seed] = score
    return found, scores
