"""What all pictures share. Figures are made without pyplot: no display and no global state is needed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ga.study.evaluations import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
OWN, GREY, DARK = "#0072B2", "#767676", "#222222"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
POINT: dict[str, Any] = {
    "markerfacecolor": "#8FBFE0",
    "markeredgecolor": OWN,
    "markeredgewidth": 0.9,
    "linestyle": "none",
}
"""How one evaluation is drawn: it must be seen on white, alone and among hundreds."""
STYLES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Okabe and Ito's palette, told apart by dashes too."""


def new_figure(panels: int, *, width: float, height: float, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `width` x `height` inches, and its `panels` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    every = list(figure.subplots(1, panels, squeeze=False, sharey=share_y)[0])
    for axes in every:
        axes.set_facecolor("white")
        axes.grid(True, color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, every


def set_heading(figure: Figure, title: str, about: str) -> None:
    """Writes what is shown above a picture, and below that of which search."""
    letters = round(13 * float(figure.get_figwidth()))  # in a line of this size
    figure.suptitle("\n".join([*textwrap.wrap(title, letters), *textwrap.wrap(about, letters)]), fontsize=10)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10], min_n_ticks=1))


def limits(values: npt.NDArray[np.float64], levels: Iterable[float] = ()) -> tuple[float, float]:
    """Returns the ends of an axis: a few very bad genomes (`none` is one) must not flatten the rest. levels: to be
    within as well where the axis grows by no more than its length to that side."""
    low, quarter, three_quarters, high = np.nanquantile(values, [0, 0.25, 0.75, 1])
    floor = max(low, quarter - 2 * (three_quarters - quarter)) if three_quarters > quarter else low
    span = high - floor
    near = [level for level in levels if floor - span <= level <= high + span]
    floor, high = min([floor, *near]), max([high, *near])
    margin = 0.05 * (high - floor) or 0.01 * max(abs(high), 1.0)
    return float(floor - margin), float(high + margin)


def draw_cell_borders(axes: Axes, *, rows: int, columns: int) -> None:
    """Draws a thin line around each cell of an image, so that empty ones are seen as cells too."""
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(False, which="major")
    axes.grid(True, which="minor", color="#C4C4C4", linewidth=0.7)
    axes.set_axisbelow(False)
    axes.tick_params(which="both", length=0)


LABEL_GAP = 0.055
"""Least distance of two labels beside a plot, as a share of its height."""


def label_lines(axes: Axes, values: Mapping[str, float], *, strong: Iterable[str] = ()) -> None:
    """Draws horizontal lines with labels on the right, moved apart, each tied to its line; those outside of the axis at
    its ends. strong: labels of solid lines."""
    low, high = axes.get_ylim()
    across = axes.get_yaxis_transform()
    order = sorted(values, key=lambda label: values[label])
    at = [min(1.0, max(0.0, (values[label] - low) / (high - low))) for label in order]
    for label, y, text_y in zip(order, at, spread(at, gap=LABEL_GAP), strict=True):
        value = values[label]
        if low <= value <= high and label in strong:
            axes.axhline(value, color=DARK, linewidth=1.2, zorder=1)
        elif low <= value <= high:
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.plot(
            [1.0, 1.018, 1.03], [y, text_y, text_y], transform=axes.transAxes, color=GREY, linewidth=0.7, clip_on=False
        )
        outside = " (below)" if value < low else " (above)" if value > high else ""
        text = f"{label} {value:.4f}{outside}"
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


def fitness_values(evaluations: Sequence[Evaluation]) -> npt.NDArray[np.float64]:
    """Returns the fitness of each, NaN where there is none."""
    return np.array([np.nan if one.fitness is None else one.fitness for one in evaluations], np.float64)
