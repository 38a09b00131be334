"""Scores per task, averages and the closing table, made of the results of single fine-tunings. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.tasks.metrics import glue_average
from engine.tasks.specs import GLUE_TASKS

Point = tuple[tuple[str, float], ...]
"""Values of the grid, like (("lr", 2e-5), ("batch", 16)); () without a grid."""


@dataclass(frozen=True)
class UnitScore:
    """The result of one fine-tuning."""

    point: Point
    seed: int
    score: float | None
    """Score of the dev splits; None: it diverged."""
    metrics: Mapping[str, float]
    steps: int
    samples: float
    """Training rows seen, repetitions counted."""
    seconds: float
    """Seconds of training, evaluations left out."""


@dataclass(frozen=True)
class TaskScore:
    """One task at its best grid point."""

    task: str
    chosen: Point
    units: tuple[UnitScore, ...]
    """Fine-tunings of the chosen point that have a score."""
    diverged: tuple[int, ...]
    """Seeds of the chosen point without a score."""
    grid: tuple[tuple[Point, float | None], ...]
    """Mean score of every point; None where every seed diverged."""
    train_rows: int
    epochs: float

    @property
    def score(self) -> float:
        """Mean over the seeds"""
        return statistics.fmean(_scores(self.units))

    @property
    def score_std(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed"""
        return _std(_scores(self.units))

    @property
    def metrics(self) -> dict[str, tuple[float, float | None]]:
        """Mean and sample standard deviation over the seeds (None for one seed)."""
        values = {name: [unit.metrics[name] for unit in self.units] for name in self.units[0].metrics}
        return {name: (statistics.fmean(seeds), _std(seeds)) for name, seeds in values.items()}

    @property
    def steps(self) -> float:
        """Mean number of optimizer steps"""
        return statistics.fmean(unit.steps for unit in self.units)

    @property
    def samples_per_s(self) -> float:
        return speed(self.units)

    def as_record(self) -> dict[str, Any]:
        """Returns what the `result` record of the job holds of the task."""
        return {
            "score": self.score,
            "score_std": self.score_std,
            "metrics": {name: {"mean": mean, "std": std} for name, (mean, std) in self.metrics.items()},
            "seeds": {str(unit.seed): unit.score for unit in self.units},
            "diverged_seeds": list(self.diverged),
            "chosen": dict(self.chosen),
            "grid": [{**dict(point), "score": score} for point, score in self.grid],
            "rows": self.train_rows,
            "epochs": self.epochs,
            "steps": self.steps,
            "samples_per_s": self.samples_per_s,
        }


def speed(units: Sequence[UnitScore]) -> float:
    """Returns the training rows per second over these fine-tunings; 0 when nothing was timed."""
    seconds = math.fsum(unit.seconds for unit in units)
    return math.fsum(unit.samples for unit in units) / seconds if seconds else 0.0


def choose(
    task: str, units: Sequence[UnitScore], *, train_rows: int, epochs: Mapping[Point, float]
) -> TaskScore | None:
    """Returns the score at the point with the best mean over its seeds that did not diverge, the first of equal ones;
    None when no unit has a score."""
    points = list(dict.fromkeys(unit.point for unit in units))
    means = {point: _mean([unit.score for unit in units if unit.point == point]) for point in points}
    scored = {point: mean for point, mean in means.items() if mean is not None}
    if not scored:
        return None
    best = max(scored, key=lambda point: scored[point])
    own = [unit for unit in units if unit.point == best]
    return TaskScore(
        task=task,
        chosen=best,
        units=tuple(unit for unit in own if unit.score is not None),
        diverged=tuple(unit.seed for unit in own if unit.score is None),
        grid=tuple(means.items()),
        train_rows=train_rows,
        epochs=epochs[best],
    )


def averages(scores: Sequence[TaskScore]) -> dict[str, float]:
    """Returns `mean` over all tasks, and GLUE's averages over those of its tasks that are there."""
    if not scores:
        return {}
    by_task = {task.task: task.score for task in scores}
    return {**glue_average(by_task), "mean": statistics.fmean(by_task.values())}


def render_table(scores: Sequence[TaskScore], *, without_score: Sequence[str] = (), absent: Sequence[str] = ()) -> str:
    """Returns a table of scores times 100, as papers print them, and the averages. without_score: tasks whose
    fine-tunings all diverged. absent: GLUE tasks that were asked for and have no files."""
    rows = [("task", "score", "metrics", "best of the grid", "seeds", "rows", "steps", "samples/s")]
    for task in scores:
        metrics = ", ".join(f"{name} {_percent(*value)}" for name, value in task.metrics.items())
        seeds = str(len(task.units)) + (f" ({len(task.diverged)} more diverged)" if task.diverged else "")
        rows.append(
            (
                task.task,
                _percent(task.score, task.score_std),
                metrics,
                ", ".join(f"{name} {value:g}" for name, value in task.chosen) or "-",
                seeds,
                f"{task.train_rows:,}",
                f"{task.steps:,.0f}",
                f"{task.samples_per_s:,.0f}",
            )
        )
    rows += [(name, "none", "every fine-tuning diverged", "", "", "", "", "") for name in without_score]
    if all(row[3] in ("-", "") for row in rows[1:]):
        rows = [(*row[:3], *row[4:]) for row in rows]  # type: ignore[misc]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_average_lines(scores, absent)])


def _average_lines(scores: Sequence[TaskScore], absent: Sequence[str]) -> list[str]:
    means, names = averages(scores), [task.task for task in scores]
    counted = [name for name in GLUE_TASKS if name in names and name != "WNLI"]
    lines = []
    if "glue" in means and len(counted) > 1:
        lines.append(f"GLUE mean      {100 * means['glue']:.2f}   of {', '.join(counted)} (without WNLI, as usual)")
        if "CoLA" in counted and "glue_without_cola" in means:
            lines.append(f"without CoLA   {100 * means['glue_without_cola']:.2f}")
    if "mean" in means and set(names) != set(counted):
        lines.append(f"mean of all    {100 * means['mean']:.2f}   of {', '.join(names)}")
    if absent:
        lines.append(f"absent         {', '.join(absent)}: no folder under task.data_dir")
    return lines


def _percent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _scores(units: Sequence[UnitScore]) -> list[float]:
    return [unit.score for unit in units if unit.score is not None]


def _std(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
