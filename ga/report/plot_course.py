"""Pictures of how a search went: its best fitness so far, and its generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ga.report.drawing import DARK, GREY, OTHERS, OWN, STYLES, fitness_values, limits, new_figure, save, whole_numbers
from ga.study.evaluations import Evaluation, rank_evaluations, spent_evaluations
from ga.view.progress import blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_GAP = 0.055
"""Least distance of two labels beside a plot, as a share of its height."""


def draw_best_so_far(
    path: Path,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    heuristics: Mapping[str, str],
) -> bool:
    """Draws the best fitness so far by evaluation. Other searches are drawn as far as this one has come: equal
    budget."""
    spent = spent_evaluations(evaluations)
    values = fitness_values(spent)
    if not np.isfinite(values).any():
        return False
    figure, (axes,) = new_figure(1, width=9.5, height=4.8)
    places = np.arange(1, len(values) + 1)
    axes.plot(places, values, "o", color=OWN, alpha=0.3, markersize=4, markeredgewidth=0, label="one evaluation")
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
    _limit_below(axes, values, highest=max(np.nanmax(line) for line in best))
    axes.set_xlim(0.5 if len(values) < 20 else 0, len(values) + max(0.5, 0.01 * len(values)))
    _label_heuristics(axes, _heuristic_fitness(spent, heuristics))
    whole_numbers(axes)
    axes.set(xlabel="evaluations", ylabel="fitness (mean of task scores)", title="Best fitness so far")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _best_so_far(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the highest value up to each place; NaN before the first fitness."""
    return np.fmax.accumulate(values)


def _limit_below(axes: Axes, values: npt.NDArray[np.float64], *, highest: float) -> None:
    """Limits the axis to most of the values; evaluations below it get a mark at its foot."""
    floor, ceiling = limits(values)
    axes.set_ylim(floor, max(ceiling, highest + 0.05 * (highest - floor)))
    below = np.flatnonzero(values < floor)
    if below.size:
        axes.plot(
            below + 1,
            np.full(below.size, 0.012),
            "v",
            transform=axes.get_xaxis_transform(),
            color=OWN,
            alpha=0.45,
            markersize=5,
            markeredgewidth=0,
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


def _label_heuristics(axes: Axes, fitness: Mapping[str, float]) -> None:
    """Draws horizontal lines with labels on the right, moved apart, each tied to its line; those below the axis at
    its foot."""
    low, high = axes.get_ylim()
    across = axes.get_yaxis_transform()
    order = sorted(fitness, key=lambda label: fitness[label])
    at = [max(0.0, (fitness[label] - low) / (high - low)) for label in order]
    for label, y, text_y in zip(order, at, spread(at, gap=LABEL_GAP), strict=True):
        value = fitness[label]
        if value >= low:
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.plot(
            [1.0, 1.018, 1.03], [y, text_y, text_y], transform=axes.transAxes, color=GREY, linewidth=0.7, clip_on=False
        )
        text = f"{label} {value:.4f}" + (" (below)" if value < low else "")
        axes.text(1.035, low + text_y * (high - low), text, transform=across, va="center", fontsize=9, color=DARK)


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Moves sorted places in 0..1 apart, as little as needed to be `gap` apart; past 1 only when there is no room."""
    groups: list[list[float]] = []  # [sum of wished starts, members]: a group's members stand `gap` apart
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _start(groups[-2], gap) + groups[-2][1] * gap > _start(groups[-1], gap):
            wish, members = groups.pop()
            groups[-1][0] += wish - members * groups[-1][1] * gap
            groups[-1][1] += members
    return [_start(group, gap) + i * gap for group in groups for i in range(int(group[1]))]


def _start(group: Sequence[float], gap: float) -> float:
    wish, members = group
    return max(0.0, min(wish / members, 1.0 - (members - 1) * gap))


def draw_generations(
    path: Path, evaluations: Sequence[Evaluation], population: int, heuristics: Mapping[str, str]
) -> bool:
    """Draws quartiles and best of each generation; of each `population` evaluations where a sampler has no
    generations."""
    spent = spent_evaluations(evaluations)
    every = [(block, fitness_values(block.evaluations)) for block in blocks(spent, population)]
    every = [(block, values[np.isfinite(values)]) for block, values in every]
    scored = [(block, values) for block, values in every if values.size]
    if not scored:
        return False
    generations = scored[0][0].evaluations[0].generation is not None and scored[0][0].name.startswith("generation")
    x = [float(block.evaluations[0].generation or 0) if generations else float(block.end) for block, _ in scored]
    low, median, high = np.array([np.quantile(values, [0.25, 0.5, 0.75]) for _, values in scored]).T
    figure, (axes,) = new_figure(1, width=8, height=4.5)
    axes.fill_between(x, low, high, color=OWN, alpha=0.18, linewidth=0, label="middle half (quartiles)")
    axes.plot(x, median, "o-", color=OWN, linewidth=1.8, markersize=5, label="median")
    axes.plot(x, [values.max() for _, values in scored], "^--", color=OTHERS[0], markersize=6, label="best of it")
    if len(scored) == 1:
        axes.vlines(x, low, high, color=OWN, alpha=0.3, linewidth=8)
    uniform = _heuristic_fitness(spent, {name: genome for name, genome in heuristics.items() if name == "uniform"})
    for label, value in uniform.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (2, 2)), label=f"{label} {value:.4f}", zorder=1)
    sizes = [len(block.evaluations) for block, _ in scored]
    size = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    axes.set_xlabel(
        f"generation (genomes in each: {size})" if generations else f"evaluations, in blocks of up to {population}"
    )
    axes.set(
        ylabel="fitness (mean of task scores)", title="Fitness by generation" if generations else "Fitness by block"
    )
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_xticks(x)
    else:
        whole_numbers(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _shorten(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
