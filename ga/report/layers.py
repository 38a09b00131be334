"""What the layers of confirmed students know of the teacher's: the layer tables of their proxy jobs, as means over the
new seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from engine.config.distill import LossConfig, trained_pairs
from engine.mapping import MappingPair
from engine.records.layer_table import LayerTable, layer_cells, layer_name, mean_table
from ga.study.evaluations import Evaluation


@dataclass(frozen=True)
class KnownLayers:
    """What the layers of one genome's students know of the teacher's."""

    table: LayerTable
    """Mean table over seeds."""
    seeds: int
    trained: frozenset[tuple[int, int]]
    """Pairs (student layer, teacher layer) that the losses compared."""

    def rows(self, name: str) -> list[list[str]]:
        """Returns a row for each student layer: its name, `name`, and the share of each teacher layer."""
        return [[layer_name(m), name, *layer_cells(row, m, self.trained)] for m, row in enumerate(self.table)]


def known_layers(evaluations: Iterable[Evaluation], loss: LossConfig) -> dict[str, KnownLayers]:
    """Returns what layers know by genome, of those whose jobs made layer tables."""
    tables: dict[str, list[LayerTable]] = defaultdict(list)
    for one in evaluations:
        tables[one.genome] += one.layers.values()
    found = {}
    for genome, by_seed in tables.items():
        if by_seed:
            size = {"student_layers": len(by_seed[0]) - 1, "teacher_layers": len(by_seed[0][0]) - 1}
            pairs = trained_pairs(loss, MappingPair.parse(genome, **size, key="genome"))
            found[genome] = KnownLayers(mean_table(by_seed), len(by_seed), pairs)
    return found
