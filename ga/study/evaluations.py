"""What a search has found out, as plain values: one Evaluation for each trial of its Optuna study."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from engine.records.layer_table import LayerTable
from engine.records.stats import rank_correlation
from engine.records.yardstick import Yardstick, fitness_of
from ga.optuna_private import trial_attrs

GENOME, SEED, GENERATION, OUTCOME, MESSAGE = "genome", "seed", "generation", "outcome", "message"
SCORES, BY_SEED, REPORTS, LAYERS = "scores", "fitness_by_seed", "reports", "layers"
SECONDS, COHORT, JOB, SAME_AS = "seconds", "cohort", "job", "same_as"
BASELINES = "baselines"
"""Names of a trial's user attributes, which optuna-dashboard shows."""

OWNER = "mapdistill:owner"
"""System attribute of a trial: id of its driver; empty: open."""

RUNNING, STOPPED_EARLY, REPEATED = "running", "stopped early", "repeated"
"""Values of Evaluation.outcome beside those of ga.jobs.outcome.Outcome."""


@dataclass(frozen=True)
class Evaluation:
    """One trial."""

    number: int
    genome: str
    """Genome in canonical text form."""
    outcome: str
    """Value of ga.jobs.outcome.Outcome, `running`, `stopped early` (halving), or `repeated`: the sampler proposed
    what another trial had evaluated, which costs nothing and is not counted."""
    fitness: float | None = None
    """Mean fitness over seeds; None without one."""
    generation: int | None = None
    """Number of the genetic algorithm's generation; None for other samplers."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score by task, mean over seeds."""
    reports: Mapping[int, float] = field(default_factory=dict)
    """Intermediate fitness by step, mean over seeds."""
    layers: Mapping[int, LayerTable] = field(default_factory=dict)
    """Layer table by seed; empty without proxy.layer_table."""
    seconds: float | None = None
    """Wall time of its job, launcher included, divided by the job's genomes; 0 when another study of the storage had
    the result already."""
    cohort: int | None = None
    """Number of genomes of its job."""
    job: str = ""
    """Place of its job, HOST:FOLDER."""
    owner: str = ""
    """Id of the driver that has claimed it, while it runs; empty: it is open."""
    message: str = ""
    """Reason why there is no fitness."""
    began: datetime.datetime | None = None
    finished: datetime.datetime | None = None

    @property
    def counts(self) -> bool:
        """Whether it is part of the budget."""
        return self.outcome != REPEATED


def read_evaluation(trial: FrozenTrial) -> Evaluation:
    """Reads a trial."""
    attrs: dict[str, Any] = trial.user_attrs
    finished = trial.state.is_finished()
    complete = trial.state == TrialState.COMPLETE and trial.values is not None
    return Evaluation(
        number=trial.number,
        genome=str(attrs.get(GENOME, "")),
        outcome=str(attrs.get(OUTCOME, "lost")) if finished else RUNNING,
        fitness=float(trial.values[0]) if complete else None,
        generation=attrs.get(GENERATION),
        by_seed={int(seed): float(value) for seed, value in attrs.get(BY_SEED, {}).items()},
        scores={str(task): float(value) for task, value in attrs.get(SCORES, {}).items()},
        reports={int(step): float(value) for step, value in attrs.get(REPORTS, {}).items()},
        layers={int(seed): table for seed, table in attrs.get(LAYERS, {}).items()},
        seconds=attrs.get(SECONDS),
        cohort=attrs.get(COHORT),
        job=str(attrs.get(JOB, "")),
        owner="" if finished else str(trial_attrs(trial).get(OWNER, "")),
        message=str(attrs.get(MESSAGE, "")),
        began=trial.datetime_start,
        finished=trial.datetime_complete,
    )


def read_history(study: Study) -> list[Evaluation]:
    """Reads the trials in the order of their numbers; without those that nobody has asked for yet."""
    trials = study.get_trials(deepcopy=False)
    return [read_evaluation(trial) for trial in trials if trial.state != TrialState.WAITING]


def rank_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Returns the evaluations with a fitness, best first; equal ones in the order of their numbers; each genome
    once."""
    scored = [one for one in evaluations if one.fitness is not None and one.counts]
    best: dict[str, Evaluation] = {}
    for one in sorted(scored, key=lambda e: (-float(e.fitness or 0.0), e.number)):
        best.setdefault(one.genome, one)
    return list(best.values())


def summarise_results(results: Sequence[Mapping[str, Any]], yardstick: Yardstick) -> dict[str, Any]:
    """Returns a trial's user attributes from its `result` records, one for each seed. yardstick: empty: that of each
    job. Intermediate fitness counts where the job had this yardstick."""
    tasks = results[0]["scores"]
    wanted = {task: asdict(scale) for task, scale in yardstick.items()}
    comparable = all(not wanted or result["yardstick"] == wanted for result in results)
    steps = set.intersection(*(set(result.get("reports", {})) for result in results)) if comparable else set()

    def fitness(result: Mapping[str, Any]) -> float:
        return fitness_of(result["scores"], yardstick) if yardstick else float(result["fitness"])

    tables = {str(result["seed"]): result["layers"] for result in results if result.get("layers")}
    return {
        BASELINES: results[0]["yardstick"],
        BY_SEED: {str(result["seed"]): fitness(result) for result in results},
        SCORES: {task: fmean(result["scores"][task] for result in results) for task in tasks},
        REPORTS: {step: fmean(result["reports"][step] for result in results) for step in sorted(steps, key=int)},
        **({LAYERS: tables} if tables else {}),
    }


def spent_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Returns what has been spent of the budget: in order of trials, without repeated proposals and running ones."""
    spent = [one for one in evaluations if one.counts and one.outcome != RUNNING]
    return sorted(spent, key=lambda one: one.number)


def count_running_jobs(evaluations: Sequence[Evaluation]) -> int:
    """Returns how many jobs the claimed trials are in."""
    return len({one.job for one in evaluations if one.owner and one.job})


def correlation_at(step: int, evaluations: Sequence[Evaluation]) -> tuple[float | None, int]:
    """Returns Spearman's coefficient between the fitness after `step` and the final one, and over how many trials."""
    both = [one for one in spent_evaluations(evaluations) if one.fitness is not None and step in one.reports]
    early = {str(one.number): one.reports[step] for one in both}
    late = {str(one.number): float(one.fitness or 0.0) for one in both}
    return rank_correlation(early, late), len(both)


def report_steps(evaluations: Sequence[Evaluation]) -> list[int]:
    """Returns the steps with an intermediate score of a trial that has a final one."""
    return sorted({step for one in spent_evaluations(evaluations) if one.fitness is not None for step in one.reports})
