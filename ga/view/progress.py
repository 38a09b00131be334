"""What a user sees of a search while it runs: a line for each generation, and the table of --status."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from optuna import Study

from engine.records.columns import columns, counted, duration_text, labelled_lines
from ga.evolution.genome import Genes, Space
from ga.evolution.operators import diversity
from ga.jobs.outcome import Outcome
from ga.study.drivers import LEASE_S, PresentDriver, present_drivers
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations, read_history, spent_evaluations

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


def status_text(study: Study, lists: Mapping[str, Study], storage: str, *, trials: int) -> str:
    """Returns the table of --status. lists: the studies of yardstick and confirmation, as far as they were begun.
    storage: its URL, fit to be shown. trials: budget."""
    evaluations = read_history(study)
    spent = spent_evaluations(evaluations)
    outcomes = Counter(one.outcome for one in spent)
    repeated = sum(not one.counts for one in evaluations)
    seconds = [one.seconds for one in spent if one.seconds]
    rows: list[tuple[str, str | list[str]]] = [
        ("search", f"{study.study_name} in {storage}"),
        (
            "evaluations",
            f"{len(spent)} of {trials} done"
            + "".join(f", {count} {name}" for name, count in outcomes.items() if name != Outcome.OK.value)
            + (f"; {repeated} repeated proposals" if repeated else ""),
        ),
        ("cost", f"{fmean(seconds):.1f} s per evaluation" if seconds else "not known yet"),
    ]
    unfinished = [one for one in evaluations if one.outcome == RUNNING]
    drivers = present_drivers(study)
    for name, listed in lists.items():
        found = read_history(listed)
        rows.append((name, f"{len(spent_evaluations(found))} of {len(listed.get_trials(deepcopy=False))} done"))
        unfinished += [one for one in found if one.outcome == RUNNING]
        drivers |= present_drivers(listed)
    rows.append(("drivers", _drivers_text(drivers) or "none: the same command without --status continues"))
    by_job: dict[str, list[str]] = {}
    at_work = {id for id, driver in drivers.items() if not driver.is_silent}
    for one in unfinished:
        if one.owner in at_work:
            by_job.setdefault(one.job or "starting", []).append(one.genome)
    rows.append(("running", [f"{job}: {' '.join(names)}" for job, names in by_job.items()] or "nothing"))
    if unfinished and not at_work:
        begun = counted(len(unfinished), "genome")
        rows.append(("open", f"{begun} begun by drivers that have ended; the same command continues"))
    return labelled_lines(rows) + "\n\n" + best_table(evaluations, SHOWN)


def _drivers_text(drivers: Mapping[str, PresentDriver]) -> list[str]:
    silent = f": no sign of life for more than {LEASE_S:.0f} s; the same command on a machine that lives continues"
    return [one.name + (silent if one.is_silent else "") for one in drivers.values()]


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
