"""What a fitness is measured by. Raw scores of different tasks cannot be averaged: what varies most would decide
alone. So a score becomes the share of the gap between the untrained student and the teacher that it closes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean

from engine.records.stats import signal_ratio

NOT_A_RESULT = "Not a result"
"""First words of what is said of a ranking that means nothing."""
SEED_DEVIATIONS = 3.0
"""A gap must be larger than so many standard deviations between seeds: otherwise its share is noise over noise."""


@dataclass(frozen=True, kw_only=True)
class TaskScale:
    """The scale that the scores of one task are read on."""

    start: float
    """Score of the student as it starts, under the uniform mapping."""
    teacher: float
    """Score of the teacher."""
    weight: float = 1.0
    """Weight in the mean over tasks; 0: the task is reported and does not count."""

    def closed_share(self, score: float) -> float:
        """Returns the share of the gap that a score closes: 0 as at the start, 1 as good as the teacher."""
        return (score - self.start) / (self.teacher - self.start)


Yardstick = Mapping[str, TaskScale]
"""Task -> its scale."""


def counting_tasks(yardstick: Yardstick) -> list[str]:
    """Returns the tasks that decide a fitness."""
    return [task for task, scale in yardstick.items() if scale.weight > 0]


def fitness_of(scores: Mapping[str, float], yardstick: Yardstick) -> float:
    """Returns the weighted mean over the tasks that count of the share of the gap that `scores` close; the mean of the
    raw scores of all tasks of the yardstick where none counts."""
    tasks = counting_tasks(yardstick)
    if not tasks:
        return fmean(scores[task] for task in yardstick)
    total = sum(yardstick[task].weight for task in tasks)
    return sum(yardstick[task].weight * yardstick[task].closed_share(scores[task]) for task in tasks) / total


def equal_scales(
    start: Mapping[str, float], teacher: Mapping[str, float], tasks: Collection[str]
) -> dict[str, TaskScale]:
    """Returns the yardstick of one job: every one of `tasks` counts alike if the teacher is better at it than the
    untrained student."""
    return {
        task: TaskScale(start=start[task], teacher=teacher[task], weight=float(teacher[task] > start[task]))
        for task in tasks
    }


def describe_yardstick(yardstick: Yardstick) -> str:
    """Returns what a fitness is, for the user."""
    tasks = counting_tasks(yardstick)
    if not tasks:
        return (
            "the mean of the raw scores, which says little: the teacher is not clearly above the untrained student on "
            f"any of {', '.join(yardstick)}"
        )
    weights = {task: yardstick[task].weight / sum(yardstick[one].weight for one in tasks) for task in tasks}
    parts = [
        f"{task} x {weight:.2f} ({yardstick[task].start:.4f} to {yardstick[task].teacher:.4f})"
        for task, weight in weights.items()
    ]
    idle = [task for task in yardstick if task not in tasks]
    unused = f"; {', '.join(idle)} {'does' if len(idle) == 1 else 'do'} not count" if idle else ""
    return f"share of the gap from the untrained student (0) to the teacher (1), {' + '.join(parts)}{unused}"


def beaten_text(scores: Mapping[str, Mapping[str, float]], yardstick: Yardstick) -> str:
    """Says on which tasks no layer mapping makes a better student than no training at all, or than the mapping `none`
    (the same steps without any mapped layer), in one line; an empty text where there is nothing to compare.

    scores: genome -> task -> score.
    """
    if all(is_none(genome) for genome in scores):
        return ""
    lines = beaten_tasks(scores, yardstick)
    if lines:
        return f"{NOT_A_RESULT} for {'; '.join(lines.values())}"
    bar = "the untrained student and none" if any(map(is_none, scores)) else "the untrained student"
    return f"on every task ({', '.join(yardstick)}) the best mapping beats {bar}"


def beaten_tasks(scores: Mapping[str, Mapping[str, float]], yardstick: Yardstick) -> dict[str, str]:
    """Returns a sentence for each task on which the best of these mappings is no better than the untrained student or
    `none`. scores: genome -> task -> score; with a mapping beside `none`."""
    none = next((one for genome, one in scores.items() if is_none(genome)), {})
    mapped = {genome: one for genome, one in scores.items() if not is_none(genome)}
    lines = {}
    for task, scale in yardstick.items():
        best = max(mapped, key=lambda genome: mapped[genome][task])
        bars = {"the untrained student": scale.start} | ({"none": none[task]} if none else {})
        bar = max(bars, key=lambda name: bars[name])
        if mapped[best][task] <= bars[bar]:
            found = f"the best, {best}, has {mapped[best][task]:.4f}"
            lines[task] = f"{task}: no mapping beats {bar} ({bars[bar]:.4f}); {found}"
    return lines


def is_none(genome: str) -> bool:
    """Tells whether a genome maps no layer at all."""
    _, _, mapping = genome.rpartition("@")  # before it: kept layers
    return not any(digit in "123456789" for digit in mapping)


@dataclass(frozen=True)
class Noise:
    """How far seeds move the scores of one task, over several mappings with several seeds each."""

    deviation: float
    """Standard deviation between seeds of one mapping, pooled over mappings."""
    reliability: float
    """Variance between mappings / (that + variance between seeds), without what seeds leave in the means."""


def noise_of(scores: Mapping[str, Mapping[int, float]]) -> Noise:
    """Returns the noise in one task's scores. scores: mapping -> seed -> score; at least two mappings with two
    seeds."""
    signal = signal_ratio(scores)
    assert signal is not None, scores
    between = max(0.0, signal.between - signal.chance * signal.within)
    total = between + signal.within
    return Noise(math.sqrt(signal.within), between / total if total else 0.0)


def weighted_scales(yardstick: Yardstick, noise: Mapping[str, Noise]) -> dict[str, TaskScale]:
    """Returns the yardstick of a search: a task counts if its gap is larger than SEED_DEVIATIONS, by its reliability;
    all alike where no such task tells mappings apart."""
    wide = {
        task
        for task, scale in yardstick.items()
        if scale.weight > 0 and scale.teacher - scale.start > SEED_DEVIATIONS * noise[task].deviation
    }
    reliable = any(noise[task].reliability > 0 for task in wide)

    def weight(task: str) -> float:
        return 0.0 if task not in wide else noise[task].reliability if reliable else 1.0

    return {
        task: TaskScale(start=scale.start, teacher=scale.teacher, weight=weight(task))
        for task, scale in yardstick.items()
    }
