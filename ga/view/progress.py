"""What a user sees of a search while it runs: a line for each generation, and the table of --status."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from optuna import Study

from engine.records.columns import columns, duration_text, labelled_lines
from ga.evolution.genome import Genes, Space
from ga.evolution.operators import diversity
from ga.jobs.outcome import Outcome
from ga.study.drivers import present_drivers
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations, read_history

SHOWN = 10


@dataclass(frozen=True)
class Block:
    """A generation; for samplers without generations, as many evaluations as a generation would have."""

    name: str
    evaluations: tuple[Evaluation, ...]
    end: int
    """Number of evaluations up to its last."""

    @property
    def done(self) -> bool:
        return all(one.outcome != RUNNING for one in self.evaluations)


def blocks(evaluations: Sequence[Evaluation], population: int) -> list[Block]:
    """Returns the generations in order; the last one may have only begun."""
    counted = [one for one in evaluations if one.counts and one.genome]
    if counted and all(one.generation is not None for one in counted):
        numbers = sorted({one.generation for one in counted if one.generation is not None})
        members = [tuple(one for one in counted if one.generation == n) for n in numbers]
        ends = itertools.accumulate(map(len, members))
        return [Block(f"generation {n}", of_it, end) for n, of_it, end in zip(numbers, members, ends, strict=True)]
    starts = range(0, len(counted), population)
    return [
        Block(f"no. {i + 1} to {i + population}", tuple(counted[i : i + population]), min(i + population, len(counted)))
        for i in starts
    ]


def gene_rows(evaluations: Sequence[Evaluation], space: Space) -> list[Genes]:
    """Returns the genes of each."""
    return [space.parse(one.genome) for one in evaluations]


class Progress:
    """Says each generation once, when it is over."""

    def __init__(self, space: Space, *, trials: int, population: int, say: Callable[[str], None]) -> None:
        self._space = space
        self._trials, self._population, self._say = trials, population, say
        self._said: set[str] | None = None
        self._began = time.monotonic()
        self._at_start = 0

    def update(self, evaluations: Sequence[Evaluation], *, over: bool) -> None:
        """Says what has ended since the last call; what was over at the first call is not said. over: no further
        evaluation will come."""
        done = sum(one.counts and one.outcome != RUNNING for one in evaluations)
        every = blocks(evaluations, self._population)
        begun = every if over else every[:-1]  # the last may get more members
        finished = [block for block in begun if block.done]
        if self._said is None:
            self._said = {block.name for block in every if block.done}
            self._at_start = done
            return
        for block in finished:
            if block.name not in self._said:
                self._said.add(block.name)
                self._say(self._line(block, evaluations, done))

    def _line(self, block: Block, evaluations: Sequence[Evaluation], done: int) -> str:
        best = rank_evaluations(evaluations)
        own = [one.fitness for one in block.evaluations if one.fitness is not None]
        failed = len(block.evaluations) - len(own)
        parts = [f"{block.name:<13}", f"{done:>4} of {self._trials}"]
        parts.append(f"best {best[0].fitness:.4f} ({best[0].genome})" if best else "no fitness yet")
        parts.append(f"mean {fmean(own):.4f}" if own else "no fitness")
        parts.append(f"diversity {diversity(gene_rows(block.evaluations, self._space)):.2f}")
        parts += [f"{failed} without fitness"] if failed else []
        here = done - self._at_start
        if here:
            pace = (time.monotonic() - self._began) / here
            parts.append(f"{pace:.1f} s per evaluation")
            if done < self._trials:
                parts.append(f"{duration_text(pace * (self._trials - done))} left")
        return "  ".join(parts)


def status_text(study: Study, storage: str, *, trials: int) -> str:
    """Returns the table of --status. storage: its URL, fit to be shown."""
    evaluations = read_history(study)
    counted = [one for one in evaluations if one.counts]
    running = [one for one in counted if one.outcome == RUNNING]
    outcomes = Counter(one.outcome for one in counted if one.outcome != RUNNING)
    repeated = len(evaluations) - len(counted)
    seconds = [one.seconds for one in counted if one.seconds]
    rows: list[tuple[str, str | list[str]]] = [
        ("search", f"{study.study_name} in {storage}"),
        (
            "evaluations",
            f"{len(counted) - len(running)} of {trials} done"
            + "".join(f", {count} {name}" for name, count in outcomes.items() if name != Outcome.OK.value)
            + (f"; {repeated} repeated proposals" if repeated else ""),
        ),
        ("cost", f"{fmean(seconds):.1f} s per evaluation" if seconds else "not known yet"),
        ("drivers", ", ".join(present_drivers(study)) or "none: the same command without --status continues"),
    ]
    by_job: dict[str, list[str]] = {}
    for one in running:
        by_job.setdefault(one.job or "starting", []).append(one.genome)
    rows.append(("running", [f"{job}: {' '.join(names)}" for job, names in by_job.items()] or "nothing"))
    return labelled_lines(rows) + "\n\n" + best_table(evaluations, SHOWN)


def best_table(evaluations: Sequence[Evaluation], shown: int) -> str:
    best = rank_evaluations(evaluations)
    if not best:
        return "no genome has a fitness yet"
    tasks = list(best[0].scores)
    rows = [["", "genome", "fitness", *tasks, "trial"]]
    for place, one in enumerate(best[:shown], start=1):
        scores = [f"{one.scores[task]:.4f}" if task in one.scores else "" for task in tasks]
        rows.append([str(place), one.genome, f"{one.fitness:.4f}", *scores, str(one.number)])
    return columns(rows, left=(1,))
