"""What a user sees of a search while it runs: a line for each generation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from engine.records.columns import duration_text
from ga.evolution.genome import Genes, Space
from ga.evolution.operators import diversity
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations, spent_evaluations


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


class Pace:
    """Seconds that an evaluation takes beside others, of those that have cost some since it was made: what was done
    before, or taken over from another search, tells nothing of those to come."""

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self._began, self._before = time.monotonic(), _count_paid(evaluations)

    def paid(self, evaluations: Sequence[Evaluation]) -> int:
        """Returns how many it is known from."""
        return _count_paid(evaluations) - self._before

    def parts(self, evaluations: Sequence[Evaluation], *, left: int) -> list[str]:
        """Returns the words for a line; none before the first evaluation that has cost something. left: evaluations to
        come."""
        paid = self.paid(evaluations)
        if not paid:
            return []
        seconds = (time.monotonic() - self._began) / paid
        return [f"{seconds:.1f} s per evaluation", *([f"{duration_text(seconds * left)} left"] if left > 0 else [])]


def _count_paid(evaluations: Sequence[Evaluation]) -> int:
    return sum(bool(one.seconds) for one in spent_evaluations(evaluations))


class Progress:
    """Says each generation once, when it is over."""

    def __init__(self, space: Space, pace: Pace, *, trials: int, population: int, say: Callable[[str], None]) -> None:
        self._space, self._pace = space, pace
        self._trials, self._population, self._say = trials, population, say
        self._said: set[str] | None = None

    def update(self, evaluations: Sequence[Evaluation], *, over: bool) -> None:
        """Says what has ended since the last call; what was over at the first call is not said. over: no further
        evaluation will come."""
        every = blocks(evaluations, self._population)
        begun = every if over else every[:-1]  # the last may get more members
        finished = [block for block in begun if block.done]
        if self._said is None:
            self._said = {block.name for block in every if block.done}
            return
        for block in finished:
            if block.name not in self._said:
                self._said.add(block.name)
                self._say(self._line(block, evaluations))

    def _line(self, block: Block, evaluations: Sequence[Evaluation]) -> str:
        done = len(spent_evaluations(evaluations))
        best = rank_evaluations(evaluations)
        own = [one.fitness for one in block.evaluations if one.fitness is not None]
        failed = len(block.evaluations) - len(own)
        parts = [f"{block.name:<13}", f"{done:>4} of {self._trials}"]
        parts.append(f"best {best[0].fitness:.4f} ({best[0].genome})" if best else "no fitness yet")
        parts.append(f"mean {fmean(own):.4f}" if own else "no fitness")
        parts.append(f"diversity {diversity(gene_rows(block.evaluations, self._space)):.2f}")
        parts += [f"{failed} without fitness"] if failed else []
        parts += self._pace.parts(evaluations, left=self._trials - done)
        return "  ".join(parts)
