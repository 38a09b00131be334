"""The space of genomes: which layer mappings a search may propose. Everything is built, counted and repaired by dynamic
programming over the student's layers, never by drawing until something fits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import UserError
from engine.mapping import SKIP, LayerMapping, MappingPair, uniform
from ga.evolution.kept_layers import FOLLOW, kept_at, kept_genes, kept_layers, kept_rank, kept_values

Genes = tuple[int, ...]
"""Teacher layer of each student layer, 0 = none; with separate_attention those of the hidden states, then those of the
attention. In a space of kind `both` the kept layers follow, the teacher layer that each student layer starts from (0 =
random) or FOLLOW; in one of kind `layers` there are no others."""
Constraint = Literal["free", "nondecreasing", "strictly_increasing"]
Kind = Literal["mapping", "layers", "both"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """All genomes under a constraint, in lexicographic order."""

    student_layers: int
    teacher_layers: int
    constraint: Constraint = "free"
    """How the non-zero genes follow each other, from the first student layer to the last."""
    min_active: int = 0
    """Fewest non-zero genes of a mapping."""
    allowed: tuple[int, ...] = ()
    """Teacher layers that may be used; empty: all. 0 always may."""
    separate_attention: bool = False
    """Whether a genome has two mappings, each under the constraint."""
    kind: Kind = "mapping"
    """What genes say: mapping, kept layers (under the constraint, with the uniform mapping), or both."""

    def __post_init__(self) -> None:
        for layer in self.allowed:
            if not 1 <= layer <= self.teacher_layers:
                raise UserError(
                    f"search.allowed_layers={list(self.allowed)}: the teacher has layers 1..{self.teacher_layers}, "
                    f"not {layer} (0, no loss, is always allowed)"
                )
        if not 0 <= self.min_active <= self.student_layers:
            raise UserError(
                f"search.min_active={self.min_active}: must be between 0 and the student's {self.student_layers} layers"
            )
        if self._mappings == 0:
            raise UserError(
                f"search.min_active={self.min_active}: no strictly increasing mapping has so many of "
                f"{len(self.choices) - 1} teacher layers; lower it, or write search.constraint=nondecreasing"
            )

    @functools.cached_property
    def choices(self) -> Genes:
        """The values of a gene under the constraint, sorted."""
        return (SKIP, *sorted(set(self.allowed or range(1, self.teacher_layers + 1))))

    @functools.cached_property
    def gene_choices(self) -> tuple[Genes, ...]:
        """The values of each gene, sorted."""
        kept = (FOLLOW, *range(self.teacher_layers + 1))
        return (self.choices,) * self._constrained + (kept,) * (self.length - self._constrained)

    @property
    def length(self) -> int:
        """Number of genes of a genome."""
        return self._constrained + (self.student_layers if self.kind == "both" else 0)

    @property
    def _constrained(self) -> int:
        """Number of genes under the constraint, the first ones."""
        return self.student_layers * (2 if self.separate_attention else 1)

    @property
    def _kept_choices(self) -> int:
        """Number of ways to keep layers beside a mapping."""
        return int((self.teacher_layers + 1) ** (self.length - self._constrained))

    @property
    def _mappings(self) -> int:
        return self._completions(self.student_layers, SKIP, 0)

    def size(self) -> int:
        """Returns the number of genomes."""
        mappings = self._mappings**2 if self.separate_attention else self._mappings
        return mappings * self._kept_choices

    def _may_follow(self, gene: int, last: int) -> bool:
        """Tells whether a gene may stand behind `last`, the last non-zero gene before it (0: there is none)."""
        if gene == SKIP or self.constraint == "free":
            return True
        return gene > last if self.constraint == "strictly_increasing" else gene >= last

    def _step(self, gene: int, last: int, active: int) -> tuple[int, int]:
        """Returns what later layers need to know: the last non-zero gene, and how many there were (up to
        min_active)."""
        if gene == SKIP:
            return last, active
        return (SKIP if self.constraint == "free" else gene), min(active + 1, self.min_active)

    @functools.cache  # noqa: B019 (a space is small, and lives as long as its search)
    def _completions(self, layers: int, last: int, active: int) -> int:
        """Returns in how many ways the last `layers` layers can be filled."""
        if layers == 0:
            return int(active >= self.min_active)
        return sum(
            self._completions(layers - 1, *self._step(gene, last, active))
            for gene in self.choices
            if self._may_follow(gene, last)
        )

    def at(self, index: int) -> Genes:
        """Returns the genome of lexicographic rank `index`, from 0. Raises IndexError."""
        if not 0 <= index < self.size():
            raise IndexError(index)
        index, kept = divmod(index, self._kept_choices)
        if self.separate_attention:
            hidden, attention = divmod(index, self._mappings)
            genes = self._mapping_at(hidden) + self._mapping_at(attention)
        else:
            genes = self._mapping_at(index)
        if self.kind == "both":
            genes += kept_at(kept, self._followed(genes), self.teacher_layers)
        return genes

    def _followed(self, genes: Genes) -> Genes:
        """Returns the layers that kept layers follow."""
        return LayerMapping(genes[: self.student_layers], self.teacher_layers).followed

    def _mapping_at(self, index: int) -> Genes:
        genes: list[int] = []
        last = active = 0
        for left in reversed(range(self.student_layers)):
            for gene in self.choices:
                if not self._may_follow(gene, last):
                    continue
                following = self._step(gene, last, active)
                ways = self._completions(left, *following)
                if index < ways:
                    genes.append(gene)
                    last, active = following
                    break
                index -= ways
        return tuple(genes)

    def index(self, genes: Genes) -> int:
        """Returns the lexicographic rank of a genome. Raises ValueError for one outside the space."""
        if genes not in self:
            raise ValueError(f"{genes} is not in the space")
        rank = 0
        for mapping in self.halves(genes):
            rank = rank * self._mappings + self._mapping_index(mapping)
        if self.kind == "both":
            kept = kept_rank(genes[self._constrained :], self._followed(genes), self.teacher_layers)
            rank = rank * self._kept_choices + kept
        return rank

    def _mapping_index(self, genes: Genes) -> int:
        index = last = active = 0
        for m, chosen in enumerate(genes, start=1):
            for gene in self.choices:
                if gene == chosen:
                    break
                if self._may_follow(gene, last):
                    index += self._completions(self.student_layers - m, *self._step(gene, last, active))
            last, active = self._step(chosen, last, active)
        return index

    def halves(self, genes: Genes) -> list[Genes]:
        """Returns what is under the constraint: one mapping, the hidden and the attention mapping, or the kept layers
        of a space of kind `layers`."""
        return [genes[i : i + self.student_layers] for i in range(0, self._constrained, self.student_layers)]

    def __iter__(self) -> Iterator[Genes]:
        return (self.at(i) for i in range(self.size()))

    def __contains__(self, genes: object) -> bool:
        if not isinstance(genes, tuple) or len(genes) != self.length:
            return False
        if not all(self._fits(mapping) for mapping in self.halves(genes)):
            return False
        if self.kind != "both":
            return True
        kept = zip(genes[self._constrained :], self._followed(genes), strict=True)
        return all(gene in kept_values(followed, self.teacher_layers) for gene, followed in kept)

    def _fits(self, mapping: Genes) -> bool:
        last = active = 0
        for gene in mapping:
            if gene not in self.choices or not self._may_follow(gene, last):
                return False
            last, active = self._step(gene, last, active)
        return active >= self.min_active

    def random(self, rng: np.random.Generator) -> Genes:
        """Draws a genome, each with the same probability."""
        return self.at(draw_below(rng, self.size()))

    def repair(self, genes: Genes) -> Genes:
        """Returns the genome of the space with the fewest genes changed; then with the smallest sum of changes; then
        the first one. Any whole numbers are taken."""
        assert len(genes) == self.length, genes
        repaired = sum((self._repaired(mapping) for mapping in self.halves(genes)), ())
        if self.kind == "both":
            repaired += kept_genes(genes[self._constrained :], self._followed(repaired), self.teacher_layers)
        return repaired

    def _repaired(self, wanted: Genes) -> Genes:
        if self._fits(wanted):
            return wanted

        @functools.cache
        def best(m: int, last: int, active: int) -> tuple[int, int, Genes] | None:
            """Returns (genes changed, sum of changes, genes) of layers m and after; None: they cannot be filled."""
            if m == len(wanted):
                return (0, 0, ()) if active >= self.min_active else None
            found: list[tuple[int, int, Genes]] = []
            for gene in self.choices:
                if not self._may_follow(gene, last):
                    continue
                rest = best(m + 1, *self._step(gene, last, active))
                if rest is not None:
                    change = abs(gene - wanted[m])
                    found.append((rest[0] + (change > 0), rest[1] + change, (gene, *rest[2])))
            return min(found, default=None)

        repaired = best(0, SKIP, 0)
        assert repaired is not None, self
        return repaired[2]

    def text(self, genes: Genes) -> str:
        """Returns `0-3-6`, or HIDDEN/ATTENTION where the two differ, after LAYERS@ where layers are kept: the name of a
        genome in records of proxy jobs."""
        mappings = [LayerMapping(half, self.teacher_layers) for half in self.halves(genes)]
        if self.kind == "layers":
            return str(MappingPair(self._uniform, self._uniform, layers=genes))
        if self.kind == "mapping":
            return str(MappingPair(mappings[0], mappings[-1]))
        layers = kept_layers(genes[self._constrained :], self._followed(genes))
        return str(MappingPair(mappings[0], mappings[-1], layers=layers))

    @property
    def _uniform(self) -> LayerMapping:
        return LayerMapping(uniform(self.student_layers, self.teacher_layers), self.teacher_layers)

    def parse(self, text: str, *, key: str = "genome") -> Genes:
        """Reads the text of a genome; also presets, and one mapping for both halves. A mapping alone keeps the layers
        that follow it; in a space of kind `layers` the text without LAYERS@ names the kept layers. Raises UserError
        (naming `key`) for what is no mapping of this shape or outside the space."""
        genes = self._read(text, key)
        if genes not in self:
            raise UserError(f"{key}={text!r} is outside the space ({self.describe()})")
        return genes

    def _read(self, text: str, key: str) -> Genes:
        pair = MappingPair.parse(text, student_layers=self.student_layers, teacher_layers=self.teacher_layers, key=key)
        if pair.layers is not None and self.kind == "mapping":
            raise UserError(f"{key}={text!r}: LAYERS@ needs search.space=both, or layers")
        if pair.separate and not self.separate_attention:
            raise UserError(f"{key}={text!r}: HIDDEN/ATTENTION needs search.separate_attention=true")
        if self.kind == "layers":
            if pair.layers is not None and pair.hidden != self._uniform:
                raise UserError(f"{key}={text!r}: search.space=layers has one mapping, {self._uniform}")
            return pair.hidden.genes if pair.layers is None else pair.layers
        genes = (pair.hidden.genes + pair.attention.genes)[: self._constrained]
        if self.kind == "both":
            followed = pair.hidden.followed
            genes += kept_genes(followed if pair.layers is None else pair.layers, followed, self.teacher_layers)
        return genes

    def heuristics(self) -> dict[str, Genes]:
        """Returns the mappings that people guess, by name: repaired where they are outside the space."""
        names = ["uniform", *(("last", "first") if self.student_layers <= self.teacher_layers else ())]
        return {name: self.repair(self._read(name, "heuristics")) for name in [*names, "all-last", "none"]}

    def seeds(self, extra: Sequence[str]) -> list[Genes]:
        """Returns the heuristics, uniform first, then `extra`; each once. Raises UserError for an extra one outside
        the space."""
        given = [self.parse(text, key="search.seeds") for text in extra]
        return list(dict.fromkeys([*self.heuristics().values(), *given]))

    def describe(self) -> str:
        """Describes the space in one line: its layers, its rules and its size."""
        rules = [self.constraint.replace("_", " ")]
        rules += [f"at least {self.min_active} active"] if self.min_active else []
        rules += [f"teacher layers {', '.join(map(str, self.choices[1:]))}"] if self.allowed else []
        rules += ["separate genes for attention"] if self.separate_attention else []
        rules += ["separate genes for kept layers"] if self.kind == "both" else []
        source = f"{self.student_layers} student layers from {self.teacher_layers} teacher layers or none"
        if self.kind == "layers":
            source = (
                f"{self.student_layers} student layers that start from {self.teacher_layers} teacher layers or at "
                f"random and learn from {self._uniform}"
            )
        return f"{source}, {', '.join(rules)}: {self.size():,} genomes"


def draw_below(rng: np.random.Generator, limit: int) -> int:
    """Draws a whole number of 0..limit - 1, each with the same probability, for a limit of any size."""
    if limit <= 2**63:
        return int(rng.integers(limit))
    bits = limit.bit_length() + 64  # the bias of the remainder is below 2^-64
    return int.from_bytes(rng.bytes(-(-bits // 8)), "big") % limit
