"""What all pictures share. Figures are made without pyplot: no display and no global state is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ga.study.evaluations import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
OWN, GREY, DARK = "#0072B2", "#767676", "#222222"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10], min_n_ticks=1))


def limits(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Returns the ends of an axis: a few very bad genomes (`none` is one) must not flatten the rest."""
    low, quarter, three_quarters, high = np.nanquantile(values, [0, 0.25, 0.75, 1])
    floor = max(low, quarter - 2 * (three_quarters - quarter)) if three_quarters > quarter else low
    margin = 0.05 * (high - floor) or 0.01 * max(abs(high), 1.0)
    return float(floor - margin), float(high + margin)


def fitness_values(evaluations: Sequence[Evaluation]) -> npt.NDArray[np.float64]:
    """Returns the fitness of each, NaN where there is none."""
    return np.array([np.nan if one.fitness is None else one.fitness for one in evaluations], np.float64)
