"""What a report must know of a search beside its evaluations."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.jobs.proxy.facts import ProxyFacts
from engine.records.yardstick import counting_tasks, fitness_of
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.storage import hide_password
from ga.study.yardstick import Measured


@dataclass(frozen=True)
class Facts:
    """What was searched, and how."""

    study: str
    """Name of the search."""
    space: Space
    sampler: str
    search_seed: int
    trials: int
    """Budget, in evaluations."""
    population: int
    cohort: int
    fingerprint: str
    teacher: str
    student: str
    tasks: tuple[str, ...]
    """Names of the tasks that were searched on."""
    yardstick: Measured
    evaluator: str
    proxy: str
    """Description of the proxy: steps, batch and text."""
    seeds: tuple[int, ...]
    """Proxy seeds of every evaluation."""
    heuristics: Mapping[str, str]
    """Genome in canonical text by name; uniform is one of them."""
    command: str
    """Command line of the search."""
    second_objective: str | None
    versions: Mapping[str, str]
    """Version of each package that computes a fitness."""
    written: datetime.datetime
    """When the report was written."""

    @property
    def about(self) -> str:
        """One line that names search, teacher and student"""
        return f"search {self.study}: {self.teacher.rpartition('/')[2]} to {self.student}"

    @property
    def levels(self) -> dict[str, float]:
        """Fitness of the untrained student and of the teacher, by their names: 0 and 1 where any task counts"""
        scales = self.yardstick.scales
        start = {task: scale.start for task, scale in scales.items()}
        teacher = {task: scale.teacher for task, scale in scales.items()}
        return {"untrained": fitness_of(start, scales), "teacher": fitness_of(teacher, scales)}

    @property
    def fitness_label(self) -> str:
        """Name of a fitness for an axis"""
        counts = counting_tasks(self.yardstick.scales)
        return "fitness: share of the gap that is closed" if counts else "fitness: mean of the raw scores"

    def names(self, genome: str) -> str:
        """Returns the names of the heuristics that it equals."""
        return " ".join(name for name, text in self.heuristics.items() if text == genome)

    @property
    def uniform(self) -> str:
        return self.heuristics["uniform"]


def report_facts(
    config: SearchConfig, space: Space, facts: ProxyFacts, yardstick: Measured, proxy_found: Mapping[str, Any] | None
) -> Facts:
    """Returns what a report says of a search. proxy_found: fingerprint and parts of its jobs; None: none has
    started."""
    s, proxy = config.search, config.proxy
    init = "as the genome says" if s.space != "mapping" else config.student.init or "random"
    student = f"{config.student.path or 'a student'} of {space.student_layers} layers"
    student += "" if config.student.path else f" (init {init})"
    return Facts(
        study=config.study,
        space=space,
        sampler=s.sampler,
        search_seed=s.seed,
        trials=s.trials,
        population=s.operators.population,
        cohort=s.cohort,
        fingerprint="of no job" if proxy_found is None else proxy_found["fingerprint"],
        teacher=f"{config.teacher.path} ({space.teacher_layers} layers)",
        student=student,
        tasks=facts.tasks,
        yardstick=yardstick,
        evaluator=proxy.evaluator,
        proxy=f"{proxy.steps} steps x {config.train.global_batch} sequences of {facts.seq_len}, {config.data.path}",
        seeds=tuple(range(config.seed, config.seed + proxy.repeats)),
        heuristics={name: space.text(genes) for name, genes in space.heuristics().items()},
        command=shlex.join(["python", *map(hide_password, sys.argv)]),
        second_objective=s.second_objective,
        versions=facts.fingerprint_parts["code"],
        written=datetime.datetime.now(),
    )
