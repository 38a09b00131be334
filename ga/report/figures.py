"""Figures without pyplot: no display and no global state is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10], min_n_ticks=1))


def new_figure(panels: int, *, width: float, height: float, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Sizes in inches; `panels` axes side by side."""
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


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Sorted places in 0..1, moved as little as needed to be `gap` apart; past 1 only when there is no room."""
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
