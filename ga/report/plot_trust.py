"""Pictures of how far scores can be trusted: noise between seeds, and early scores against final ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ga.report.confirmation import Confirmed, Difference, compare, seed_deviation
from ga.report.drawing import (
    DARK,
    OTHERS,
    OWN,
    POINT,
    fitness_values,
    label_lines,
    limits,
    new_figure,
    save,
    set_heading,
)
from ga.report.facts import Facts
from ga.study.evaluations import Evaluation, correlation_at, report_steps, spent_evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 4


def draw_seed_noise(path: Path, facts: Facts, confirmed: Confirmed) -> bool:
    """Draws on the left the fitness of each seed, on the right the differences to uniform at equal seeds with their
    intervals."""
    confirmed = {genome: by_seed for genome, by_seed in confirmed.items() if by_seed}
    if not confirmed:
        return False
    uniform = facts.uniform
    order = sorted(confirmed, key=lambda genome: fmean(confirmed[genome].values()))
    differences = {one.genome: one for one in compare(confirmed, uniform) if one.mean is not None}
    figure, panels = new_figure(2 if differences else 1, width=9.5, height=2.6 + 0.55 * len(order), share_y=True)
    axes = panels[0]
    for y, genome in enumerate(order):
        colour = OTHERS[0] if genome == uniform else OWN
        values = list(confirmed[genome].values())
        axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.75, markersize=6, markeredgewidth=0)
        axes.plot([fmean(values)] * 2, [y - 0.28, y + 0.28], color=colour, linewidth=2.4)
        if genome in differences:
            _draw_difference(panels[1], y, differences[genome], confirmed[genome], confirmed[uniform])
    names = [_wrap(genome, genome == uniform, len(confirmed[genome])) for genome in order]
    axes.set_yticks(range(len(order)), names)
    _draw_levels(axes, facts.levels, np.array([value for by_seed in confirmed.values() for value in by_seed.values()]))
    axes.set_ylim(-0.6, len(order) - 0.4)
    deviation = seed_deviation(confirmed)
    noise = "" if deviation is None else f"\nstandard deviation between seeds {deviation:.4f}"
    axes.set_title(f"Dots: new seeds, bar: their mean{noise}", fontsize=10)
    axes.set_xlabel(facts.fitness_label)
    set_heading(figure, "The best genomes and uniform with new seeds", facts.about)
    if differences:
        panels[1].axvline(0, color=OTHERS[0], linewidth=1.4, linestyle=(0, (2, 2)))
        panels[1].set_title("Difference to uniform at equal seeds\nmean and 95 % interval", fontsize=10)
        panels[1].set_xlabel("fitness minus uniform's")
    for panel in panels:
        panel.locator_params(axis="x", nbins=5)
    save(figure, path)
    return True


def _draw_levels(axes: Axes, levels: Mapping[str, float], values: npt.NDArray[np.float64]) -> None:
    """Draws vertical lines with their names on them, as far as they are near the values; the others are named below."""
    low, high = limits(values, levels.values())
    axes.set_xlim(low, high)
    for name, value in levels.items():
        if low <= value <= high:
            axes.axvline(value, color=DARK, linewidth=1.2, zorder=1)
            axes.text(
                *(value, 0.98, f"{name} "),
                transform=axes.get_xaxis_transform(),
                rotation=90,
                ha="right",
                va="top",
                fontsize=8,
            )
    outside = [f"{name} {value:.4f}" for name, value in levels.items() if not low <= value <= high]
    if outside:
        axes.text(
            *(0.02, 0.02, f"outside: {', '.join(outside)}"),
            transform=axes.transAxes,
            va="bottom",
            fontsize=8,
            color=DARK,
        )


def _draw_difference(
    axes: Axes, y: float, difference: Difference, own: Mapping[int, float], uniform: Mapping[int, float]
) -> None:
    single = [own[seed] - uniform[seed] for seed in sorted(own.keys() & uniform.keys())]
    axes.plot(single, [y - 0.22] * len(single), "o", color=OWN, alpha=0.7, markersize=4.5, markeredgewidth=0)
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [y, y], color=OWN, linewidth=2, marker="|", markersize=10)
    assert difference.mean is not None
    axes.plot([difference.mean], [y], "D", color=OWN, markersize=6)


def _wrap(genome: str, is_uniform: bool, n: int) -> str:
    lines = genome.replace("/", "/\n")
    return (f"{lines} (uniform)" if is_uniform else lines) + f"\nn {n}"


def draw_early_late(path: Path, facts: Facts, evaluations: Sequence[Evaluation]) -> bool:
    """Draws a panel for each intermediate step; of more than MOST_PANELS, some from the first to the last."""
    steps = report_steps(evaluations)
    if not steps:
        return False
    if len(steps) > MOST_PANELS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    figure, panels = new_figure(len(steps), width=max(6.0, 1.6 + 3.1 * len(steps)), height=4.2, share_y=True)
    levels = facts.levels.values()
    for step, axes in zip(steps, panels, strict=True):
        both = [one for one in spent_evaluations(evaluations) if one.fitness is not None and step in one.reports]
        early, late = np.array([one.reports[step] for one in both]), fitness_values(both)
        (left, right), (foot, head) = limits(early), limits(late, levels)
        outside = int(((early < left) | (late < foot)).sum())
        axes.plot(early, late, "o", markersize=5, zorder=2, **POINT)
        for level in levels:
            axes.axhline(level, color=DARK, linewidth=1.2, zorder=1)
        axes.set(xlim=(left, right), ylim=(foot, head))
        correlation, n = correlation_at(step, evaluations)
        found = "" if correlation is None else f"Spearman {correlation:.2f}, "
        axes.set_title(f"{found}n {n}" + (f" ({outside} outside)" if outside else ""), fontsize=10)
        axes.set_xlabel(f"fitness after step {step}")
        axes.locator_params(axis="x", nbins=4)
    label_lines(panels[-1], facts.levels, strong=facts.levels)
    panels[0].set_ylabel("final fitness")
    set_heading(figure, "Intermediate fitness against final fitness", facts.about)
    save(figure, path)
    return True
