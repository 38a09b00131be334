"""The genes of kept layers beside a mapping: the teacher layer that each student layer starts from (0 = random), or
FOLLOW for the one that the mapping implies (LayerMapping.followed). It has no other gene: each start has one genome.
"""

from __future__ import annotations

from collections.abc import Sequence

FOLLOW = -1

Layers = tuple[int, ...]


def kept_values(followed: int, teacher_layers: int) -> Layers:
    """Returns the values of a gene, sorted, each of them another layer."""
    return (FOLLOW, *(layer for layer in range(teacher_layers + 1) if layer != followed))


def kept_genes(layers: Sequence[int], followed: Sequence[int], teacher_layers: int) -> Layers:
    """Returns the genes of kept layers, or mends genes: FOLLOW where a layer is what is followed. Any whole numbers are
    taken."""
    near = (max(FOLLOW, min(layer, teacher_layers)) for layer in layers)
    return tuple(FOLLOW if layer == other else layer for layer, other in zip(near, followed, strict=True))


def kept_layers(genes: Sequence[int], followed: Sequence[int]) -> Layers:
    """Returns the layers that genes stand for."""
    return tuple(other if gene == FOLLOW else gene for gene, other in zip(genes, followed, strict=True))


def kept_at(index: int, followed: Sequence[int], teacher_layers: int) -> Layers:
    """Returns the genes of lexicographic rank `index`, from 0."""
    genes: list[int] = []
    for other in reversed(followed):  # the last gene is the last digit
        index, digit = divmod(index, teacher_layers + 1)
        genes.append(kept_values(other, teacher_layers)[digit])
    return tuple(reversed(genes))


def kept_rank(genes: Sequence[int], followed: Sequence[int], teacher_layers: int) -> int:
    """Returns the lexicographic rank of genes. Raises ValueError for what none are."""
    rank = 0
    for gene, other in zip(genes, followed, strict=True):
        rank = rank * (teacher_layers + 1) + kept_values(other, teacher_layers).index(gene)
    return rank
