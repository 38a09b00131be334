"""The picture of the best genomes' genes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.mapping import MappingPair
from ga.report.drawing import DARK, OTHERS, draw_cell_borders, new_figure, save, set_heading
from ga.report.facts import Facts
from ga.study.evaluations import Evaluation, rank_evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP_SHARE = 0.25
MOST_LABELLED_CELLS = 200


def draw_genes(path: Path, facts: Facts, evaluations: Sequence[Evaluation]) -> bool:
    """Draws the share of each teacher layer at each student layer among the best TOP_SHARE; the genes of uniform are
    framed."""
    best = rank_evaluations(evaluations)
    if not best:
        return False
    top = best[: math.ceil(TOP_SHARE * len(best))]
    texts = [one.genome for one in evaluations if one.genome] + list(facts.heuristics.values())
    known = {text: MappingPair.genes_in(text) for text in texts}
    titles = {0: "hidden states", 1: "attention", 2: "start"}
    if all(hidden == attention for hidden, attention, _ in known.values()):
        titles = {0: "mapping", 2: "start"}
    if not any(kept for _, _, kept in known.values()):
        del titles[2]
    halves = len(titles)
    teacher_layers = max(max(sum(parts, ())) for parts in known.values())
    students = len(known[top[0].genome][0])
    size = max(2.6 + 0.55 * students, 4.2)
    figure, panels = new_figure(halves, width=size * halves + 0.8, height=max(3.4, 1.8 + 0.4 * (teacher_layers + 1)))
    image = None
    for half, axes in zip(titles, panels, strict=True):
        shares = np.zeros((teacher_layers + 1, students))
        for one in top:
            for m, gene in enumerate(known[one.genome][half]):
                shares[gene, m] += 1 / len(top)
        image = axes.imshow(shares, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
        draw_cell_borders(axes, rows=teacher_layers + 1, columns=students)
        _label_cells(axes, shares, len(top))
        for m, gene in enumerate(known[facts.uniform][half]):
            left, right, foot, top_edge = m - 0.47, m + 0.47, gene - 0.47, gene + 0.47
            axes.plot(
                [left, right, right, left, left], [foot, foot, top_edge, top_edge, foot], color=OTHERS[0], linewidth=1.8
            )
        axes.set_xticks(range(students), [str(m + 1) for m in range(students)])
        axes.set_yticks(range(teacher_layers + 1), ["none", *map(str, range(1, teacher_layers + 1))])
        axes.set(xlabel="student layer", ylabel="teacher layer" if half == 0 else "")
        if halves > 1:
            axes.set_title(titles[half], fontsize=10)
    set_heading(figure, f"Genes of the best {len(top)} of {len(best)} genomes; framed: uniform", facts.about)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, ticks=[0, 0.25, 0.5, 0.75, 1.0], pad=0.02)
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.set_label(f"share of these {len(top)} genomes")
    save(figure, path)
    return True


def _label_cells(axes: Axes, shares: npt.NDArray[np.float64], n: int) -> None:
    """Writes into each cell how many of the `n` genomes it stands for."""
    if shares.size > MOST_LABELLED_CELLS:
        return
    for (gene, m), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.55 else DARK
            axes.text(m, gene, f"{share * n:.0f}/{n}", ha="center", va="center", fontsize=8, color=colour)
