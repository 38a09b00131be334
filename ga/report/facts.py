"""What a report must know of a search beside its evaluations."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.jobs.proxy_facts import ProxyFacts
from ga.study.storage import hide_password
from ga.study.yardstick import Measured


@dataclass(frozen=True)
class Facts:
    """What was searched, and how."""

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

    def names(self, genome: str) -> str:
        """Returns the names of the heuristics that it equals."""
        return " ".join(name for name, text in self.heuristics.items() if text == genome)

    @property
    def uniform(self) -> str:
        return self.heuristics["uniform"]


def report_facts(config: SearchConfig, space: Space, facts: ProxyFacts, yardstick: Measured) -> Facts:
    s, proxy = config.search, config.proxy
    init = "as the genome says" if s.space != "mapping" else config.student.init or "random"
    student = config.student.path or f"{space.student_layers} layers, init {init}"
    return Facts(
        space=space,
        sampler=s.sampler,
        search_seed=s.seed,
        trials=s.trials,
        population=s.operators.population,
        cohort=s.cohort,
        fingerprint=facts.fingerprint,
        teacher=f"{config.teacher.path}: {space.teacher_layers} layers",
        student=student,
        tasks=facts.tasks,
        yardstick=yardstick,
        evaluator=proxy.evaluator,
        proxy=f"{proxy.steps} steps x {config.train.global_batch} sequences of {facts.seq_len}, {config.data.path}",
        seeds=tuple(range(config.seed, config.seed + proxy.repeats)),
        heuristics={name: space.text(genes) for name, genes in space.heuristics().items()},
        command=shlex.join(["python", *map(hide_password, sys.argv)]),
        second_objective=s.second_objective,
    )
