"""The picture of what each gene is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ga.evolution.effects import Estimate
from ga.report.drawing import DARK, GREY, new_figure, save
from ga.report.effects import Models, value_label
from ga.report.plot_genes import MOST_LABELLED_CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 18.0
"""Inches of a picture; panels that do not fit are left out, the last first."""


def draw_effects(path: Path, models: Models, labels: Sequence[str]) -> bool:
    """Draws the effect of each teacher layer on each student layer, for the fitness and as many tasks as fit; what is
    clear of 0 is written in bold and framed. labels: of the genes."""
    if not models:
        return False
    panel = max(2.4, 0.9 + 0.55 * len(labels))
    shown = {name: model.main_effects for name, model in list(models.items())[: max(1, int(WIDEST / panel))]}
    rows = sorted({value for effects in shown.values() for by_value in effects for value in by_value})
    width = 1.0 + len(shown) * panel
    figure, panels = new_figure(len(shown), width=width + 0.8, height=max(3.4, 1.9 + 0.4 * len(rows)), share_y=True)
    most = max(abs(one.mean) for effects in shown.values() for by_value in effects for one in by_value.values()) or 1.0
    image = None
    for (name, effects), axes in zip(shown.items(), panels, strict=True):
        cells = np.full((len(rows), len(labels)), np.nan)
        for gene, by_value in enumerate(effects):
            for value, one in by_value.items():
                cells[rows.index(value), gene] = one.mean
        image = axes.imshow(cells, origin="lower", aspect="auto", cmap="PuOr_r", vmin=-most, vmax=most)
        for gene, by_value in enumerate(effects):
            for value, one in by_value.items():
                _mark_cell(axes, gene, rows.index(value), one, most=most, labelled=cells.size <= MOST_LABELLED_CELLS)
        axes.set_xticks(range(len(labels)), [label.replace(" (", "\n(") for label in labels])
        axes.set_yticks(range(len(rows)), [value_label(value) for value in rows])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("student layer")
    panels[0].set_ylabel("teacher layer")
    figure.suptitle(
        "What learning from a teacher layer is worth, in hundredths\nbold and framed: clear of 0", fontsize=10
    )
    assert image is not None
    figure.colorbar(image, ax=panels, pad=0.02).set_label("against the average choice of that layer")
    save(figure, path)
    return True


def _mark_cell(axes: Axes, gene: int, row: int, one: Estimate, *, most: float, labelled: bool) -> None:
    if one.is_clear:
        x, y = gene, row
        axes.plot(
            [x - 0.46, x + 0.46, x + 0.46, x - 0.46, x - 0.46],
            [y - 0.46, y - 0.46, y + 0.46, y + 0.46, y - 0.46],
            color=DARK,
            linewidth=1.3,
        )
    if labelled:
        dark = "white" if abs(one.mean) > 0.7 * most else DARK if one.is_clear else GREY
        weight = "bold" if one.is_clear else "normal"
        axes.text(gene, row, f"{100 * one.mean:+.1f}", ha="center", va="center", fontsize=8, color=dark, weight=weight)
