"""Pictures of how a search went: its best fitness so far, and its generations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ga.report.drawing import (
    OTHERS,
    OWN,
    POINT,
    STYLES,
    fitness_values,
    label_lines,
    limits,
    new_figure,
    save,
    set_heading,
    whole_numbers,
)
from ga.report.facts import Facts
from ga.study.evaluations import Evaluation, rank_evaluations, spent_evaluations
from ga.view.progress import blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_IN_BAND = 10
"""Evaluations of a generation below which its quartiles are no band: each would be one or two points."""


def draw_best_so_far(
    path: Path, facts: Facts, evaluations: Sequence[Evaluation], others: Mapping[str, Sequence[Evaluation]]
) -> bool:
    """Draws the best fitness so far by evaluation. Other searches are drawn as far as this one has come: equal
    budget."""
    spent = spent_evaluations(evaluations)
    values = fitness_values(spent)
    if not np.isfinite(values).any():
        return False
    figure, (axes,) = new_figure(1, width=9.5, height=4.8)
    places = np.arange(1.0, len(values) + 1)
    axes.plot(places, values, "o", markersize=5, label="one evaluation", zorder=2, **POINT)
    best = [_best_so_far(values)]
    axes.step(places, best[0], where="post", color=OWN, linewidth=3, label="best so far, this search", zorder=3)
    for i, (name, other) in enumerate(others.items()):
        theirs = fitness_values(spent_evaluations(other))
        shown = theirs[: len(values)]
        if not np.isfinite(shown).any():
            continue
        best.append(_best_so_far(shown))
        label = f"best so far, {_shorten(name)}" + (f" (first {len(shown)})" if len(theirs) > len(shown) else "")
        colour, dashes = OTHERS[i % len(OTHERS)], STYLES[(i + i // len(OTHERS)) % len(STYLES)]
        x = np.arange(1, len(shown) + 1)
        axes.step(x, best[-1], where="post", label=label, color=colour, linestyle=dashes, linewidth=1.6, zorder=4)
        if len(shown) == 1:
            axes.plot([1], shown, "D", color=colour, markersize=5)
    _limit_below(axes, places, values, facts.levels.values(), highest=max(np.nanmax(line) for line in best))
    axes.set_xlim(0.5 if len(values) < 20 else 0, len(values) + max(0.5, 0.01 * len(values)))
    label_lines(axes, _heuristic_fitness(spent, facts.heuristics) | facts.levels, strong=facts.levels)
    whole_numbers(axes)
    axes.set(xlabel="evaluations", ylabel=facts.fitness_label)
    set_heading(figure, "Best fitness so far", facts.about)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _best_so_far(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the highest value up to each place; NaN before the first fitness."""
    return np.fmax.accumulate(values)


def _limit_below(
    axes: Axes, x: npt.NDArray[np.float64], values: npt.NDArray[np.float64], levels: Iterable[float], *, highest: float
) -> None:
    """Limits the axis to most of the values; evaluations below it get a mark at its foot."""
    floor, ceiling = limits(values, levels)
    axes.set_ylim(floor, max(ceiling, highest + 0.05 * (highest - floor)))
    below = np.flatnonzero(values < floor)
    if below.size:
        axes.plot(
            x[below],
            np.full(below.size, 0.012),
            "v",
            transform=axes.get_xaxis_transform(),
            markersize=6,
            **POINT,
            label="evaluation below the axis",
        )


def _heuristic_fitness(spent: Sequence[Evaluation], heuristics: Mapping[str, str]) -> dict[str, float]:
    """Returns the fitness by label; heuristics that are the same genome share a label. Those without a fitness are
    left out."""
    names: dict[str, list[str]] = {}
    for name, genome in heuristics.items():
        names.setdefault(genome, []).append(name)
    fitness = {one.genome: one.fitness for one in rank_evaluations(spent) if one.fitness is not None}
    return {" = ".join(named): fitness[genome] for genome, named in names.items() if genome in fitness}


def draw_generations(path: Path, facts: Facts, evaluations: Sequence[Evaluation]) -> bool:
    """Draws the evaluations of each generation with their median and their best, and quartiles where there are
    FEWEST_IN_BAND; of each `population` evaluations where a sampler has no generations."""
    spent = spent_evaluations(evaluations)
    every = [(block, fitness_values(block.evaluations)) for block in blocks(spent, facts.population)]
    every = [(block, values[np.isfinite(values)]) for block, values in every]
    scored = [(block, values) for block, values in every if values.size]
    if not scored:
        return False
    generations = scored[0][0].evaluations[0].generation is not None and scored[0][0].name.startswith("generation")
    x = [float(block.evaluations[0].generation or 0) if generations else float(block.end) for block, _ in scored]
    sizes = [values.size for _, values in scored]
    figure, (axes,) = new_figure(1, width=9.5, height=4.5)
    every_x, every_y = np.repeat(x, sizes), np.concatenate([values for _, values in scored])
    axes.plot(every_x, every_y, "o", markersize=4.5, label="one evaluation", zorder=2, **POINT)
    if max(sizes) >= FEWEST_IN_BAND:
        low, high = np.array([np.quantile(values, [0.25, 0.75]) for _, values in scored]).T
        enough = np.array(sizes) >= FEWEST_IN_BAND
        axes.fill_between(x, low, high, where=enough, color=OWN, alpha=0.2, linewidth=0, label="middle half")
    median = [float(np.median(values)) for _, values in scored]
    axes.plot(x, median, "s-", color=OWN, linewidth=1.8, markersize=6, label="median", zorder=3)
    axes.plot(x, [values.max() for _, values in scored], "^--", color=OTHERS[0], markersize=7, label="best", zorder=3)
    _limit_below(axes, every_x, every_y, facts.levels.values(), highest=every_y.max())
    uniform = _heuristic_fitness(spent, {"uniform": facts.uniform})
    label_lines(axes, uniform | facts.levels, strong=facts.levels)
    size = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    axes.set_xlabel(
        f"generation (n {size} in each)" if generations else f"evaluations, in blocks of up to {facts.population}"
    )
    axes.set_ylabel(facts.fitness_label)
    set_heading(figure, "Fitness by generation" if generations else "Fitness by block", facts.about)
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_xticks(x)
    else:
        whole_numbers(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _shorten(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
