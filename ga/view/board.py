"""TensorBoard's pages of a search."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import api_pb2

from engine.records.events import EventFile
from ga.evolution.genome import Space
from ga.evolution.operators import diversity
from ga.evolution.sampler import gene_parameters, gene_ranges
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations
from ga.view.progress import Block, blocks, gene_rows

KIND = api_pb2.DATASET_VALIDATION
SEARCH, TRIALS = "search", "trials"
"""Names of TensorBoard's runs: the whole search, and one for each trial."""
FITNESS = "fitness"
METRICS = "trial/"
"""Group of the trials' metrics: below `search/` on the page, not above it."""


def columns(space: Space, tasks: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Returns the columns of the HPARAMS page: genome and genes, fitness and tasks."""
    genome = api_pb2.HParamInfo(name="genome", type=api_pb2.DATA_TYPE_STRING)
    domains = {
        name: api_pb2.Interval(min_value=low, max_value=high) for name, (low, high) in gene_ranges(space).items()
    }
    genes = [
        api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64, domain_interval=domain)
        for name, domain in domains.items()
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=METRICS + tag), display_name=tag, dataset_type=KIND)
        for tag in (FITNESS, *tasks)
    ]
    return [genome, *genes], metrics


class SearchBoard:
    """The curves of a search against the number of finished evaluations, and its trials under HPARAMS.

    All of it is made anew from the history when it is opened, so that a continued search has whole curves.
    """

    def __init__(self, folder: Path, space: Space, *, tasks: Sequence[str], say: Callable[[str], None]) -> None:
        """Begins the files anew. say: is told when they cannot be written."""
        for name in (SEARCH, TRIALS):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._folder, self._space, self._say = folder, space, say
        self._file = EventFile(folder / SEARCH, tell=say)
        self._file.hparam_columns(*columns(space, tasks))
        self._seen: list[int] = []
        """Numbers of the trials that are written, in order."""
        self._blocks: set[str] = set()
        self._last: Block | None = None
        """Last block, if it has no point yet, but has one if nothing more comes."""
        self._jobs: int | None = None

    def refresh(self, evaluations: Sequence[Evaluation], *, running_jobs: int, population: int) -> None:
        """Adds what is new."""
        finished = {one.number: one for one in evaluations if one.counts and one.outcome != RUNNING}
        new = sorted((one for one in finished.values() if one.number not in self._seen), key=_when)
        for one in new:
            self._seen.append(one.number)
            self._add(one, [finished[number] for number in self._seen if number in finished])
        # in the order in which they ended: TensorBoard drops points when steps go back
        every = blocks([finished[number] for number in self._seen if number in finished], population)
        for block in every:
            if block is not every[-1] or _is_whole(block, evaluations, population):
                self._add_block(block)
        busy = any(one.counts and one.outcome == RUNNING for one in evaluations)
        self._last = every[-1] if every and not busy else None
        if running_jobs != self._jobs:
            self._jobs = running_jobs
            self._file.scalars({"search/jobs_running": running_jobs}, len(self._seen))

    def _add(self, one: Evaluation, spent: Sequence[Evaluation]) -> None:
        best, when = rank_evaluations(spent), _when(one)
        points = {
            "best": best[0].fitness if best else None,
            "fitness": one.fitness,
            "seconds_per_evaluation": one.seconds or None,
            "without_fitness": float(sum(other.fitness is None for other in spent)),
        }
        known = {f"search/{name}": value for name, value in points.items() if value is not None}
        self._file.scalars(known, len(spent), when=when)
        if not one.genome:  # ended from outside before it was described
            return
        genes = gene_parameters(self._space, self._space.parse(one.genome))
        metrics = {} if one.fitness is None else {FITNESS: one.fitness, **one.scores}
        trial = EventFile(self._folder / TRIALS / f"{one.number:05d}", tell=self._say)
        trial.hparam_session(
            {"genome": one.genome, **genes},
            {METRICS + name: value for name, value in metrics.items()},
            group=f"{one.number:05d}",
            when=when,
        )
        trial.close()

    def _add_block(self, block: Block) -> None:
        """Adds its point once."""
        if block.name in self._blocks:
            return
        self._blocks.add(block.name)
        group = block.evaluations
        step = max(self._seen.index(one.number) for one in group) + 1
        when = max(map(_when, group))
        fitness = [one.fitness for one in group if one.fitness is not None]
        points = {"search/mean": sum(fitness) / len(fitness)} if fitness else {}
        points["search/diversity"] = diversity(gene_rows(group, self._space))
        self._file.scalars(points, step, when=when)

    def close(self) -> None:
        """Ends the file. The last generation has its point then, though it may be a small one."""
        if self._last is not None:
            self._add_block(self._last)
        self._file.close()


def _is_whole(block: Block, evaluations: Sequence[Evaluation], population: int) -> bool:
    """Tells whether a block of finished evaluations gets no more of them."""
    generation = block.evaluations[0].generation
    if (
        generation != 0 and len(block.evaluations) >= population
    ):  # generation 0 is larger when there are many heuristics
        return True
    # children are asked for when all parents have ended
    return generation is not None and any((one.generation or 0) > generation for one in evaluations)


def _when(one: Evaluation) -> float:
    """Returns when an evaluation was finished, in seconds since 1970."""
    return 0.0 if one.finished is None else one.finished.timestamp()
