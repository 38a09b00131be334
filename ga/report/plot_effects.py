"""The picture of what each gene is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ga.evolution.effects import Estimate
from ga.report.drawing import DARK, draw_cell_borders, new_figure, save, set_heading
from ga.report.effects import Models, gene_labels, value_label
from ga.report.facts import Facts
from ga.report.plot_genes import MOST_LABELLED_CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 18.0
"""Inches of a picture; panels that do not fit are left out, the last first."""

PALE = 0.3
"""Opacity of what may be nothing."""


def draw_effects(path: Path, facts: Facts, models: Models) -> bool:
    """Draws the effect of each teacher layer on each student layer, for the fitness and as many tasks as fit; what is
    clear of 0 is written in bold and framed, the rest is pale."""
    if not models:
        return False
    labels = gene_labels(facts.space)
    panel = max(2.4, 0.9 + 0.55 * len(labels))
    shown = {name: model.main_effects for name, model in list(models.items())[: max(1, int(WIDEST / panel))]}
    rows = sorted({value for effects in shown.values() for by_value in effects for value in by_value})
    width = 1.0 + len(shown) * panel
    figure, panels = new_figure(len(shown), width=width + 0.8, height=max(3.4, 1.9 + 0.4 * len(rows)), share_y=True)
    most = max(abs(one.mean) for effects in shown.values() for by_value in effects for one in by_value.values()) or 1.0
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    for (name, effects), axes in zip(shown.items(), panels, strict=True):
        cells, opacity = np.full((len(rows), len(labels)), np.nan), np.full((len(rows), len(labels)), PALE)
        for gene, by_value in enumerate(effects):
            for value, one in by_value.items():
                cells[rows.index(value), gene] = one.mean
                opacity[rows.index(value), gene] = 1.0 if one.is_clear else PALE
        axes.imshow(cells, alpha=opacity, origin="lower", aspect="auto", cmap="PuOr_r", vmin=-most, vmax=most)
        draw_cell_borders(axes, rows=len(rows), columns=len(labels))
        for gene, by_value in enumerate(effects):
            for value, one in by_value.items():
                _mark_cell(axes, gene, rows.index(value), one, most=most, labelled=cells.size <= MOST_LABELLED_CELLS)
        axes.set_xticks(range(len(labels)), labels, rotation=90 if any(" (" in label for label in labels) else 0)
        axes.set_yticks(range(len(rows)), [value_label(value) for value in rows])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("student layer")
    panels[0].set_ylabel("teacher layer")
    count = next(iter(models.values())).evaluations
    what = f"What learning from a teacher layer is worth, in hundredths (n {count}); bold and framed: clear of 0"
    set_heading(figure, what, facts.about)
    colours = ScalarMappable(Normalize(-most, most), "PuOr_r")
    figure.colorbar(colours, ax=panels, pad=0.02).set_label("against the average choice of that layer")
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
        dark = "white" if one.is_clear and abs(one.mean) > 0.6 * most else DARK
        weight = "bold" if one.is_clear else "normal"
        axes.text(gene, row, f"{100 * one.mean:+.1f}", ha="center", va="center", fontsize=8, color=dark, weight=weight)
