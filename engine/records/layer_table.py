"""The text of a layer table: what each student layer knows of each teacher layer. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from engine.records.columns import columns

LayerTable = Sequence[Sequence[float | None]]
"""Row m, column n: R² of a linear map from student layer m to teacher layer n, layer 0 being the embeddings; None where
the student's states are not finite."""

MEANING = (
    "share of each teacher layer's variance that a linear map of a student layer explains,\n"
    "on text that it was not fitted on (never part of the fitness); *: a pair that was trained"
)
CORNER = "student\\teacher"


def layer_name(layer: int) -> str:
    return str(layer) if layer else "emb"


def layer_cells(row: Sequence[float | None], layer: int, trained: Collection[tuple[int, int]]) -> list[str]:
    """Returns the cells of one student layer: `.83*` where the two layers were compared by a loss, `.83` elsewhere."""
    return [_share(value) + ("*" if (layer, n) in trained else "") for n, value in enumerate(row)]


def _share(value: float | None) -> str:
    if value is None:
        return "n/a"
    text = f"{value:.2f}" if value > -10 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def layer_text(table: LayerTable, trained: Collection[tuple[int, int]], *, title: str) -> str:
    """Returns the table for a terminal: rows are student layers, columns are teacher layers."""
    rows = [[CORNER, *(f"{layer_name(n)} " for n in range(len(table[0])))]]
    for layer, row in enumerate(table):
        cells = layer_cells(row, layer, trained)
        rows.append([layer_name(layer), *(cell if cell.endswith("*") else f"{cell} " for cell in cells)])
    return f"{title}\n{columns(rows)}"


def mean_table(tables: Sequence[LayerTable]) -> LayerTable:
    """Returns the means of each entry over tables of one size; None where one of them has none."""
    return [[_mean(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
