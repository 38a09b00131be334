"""Layer mapping: student layer m = 1..M learns from teacher layer g(m) in 1..N, or from none (SKIP = 0).

The only place with mapping arithmetic, and with the text of a genome. Layers are 1-based everywhere; 0 means "no loss
for this layer", never "the embeddings" (those have a switch of their own, `loss.embedding`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from engine.errors import UserError

SKIP = 0
PRESETS = ("uniform", "last", "last-only", "first", "all-last", "none", "random:SEED")
RANDOM_EACH_STEP = "random-each-step"
"""Text of a RandomEachStep."""


@dataclass(frozen=True)
class LayerMapping:
    """`genes[m - 1]` is the teacher layer of student layer m; 0 is SKIP. `teacher_layers` is N."""

    genes: tuple[int, ...]
    teacher_layers: int

    def __post_init__(self) -> None:
        if not self.genes:
            raise UserError("a layer mapping needs at least one student layer")
        for m, g in enumerate(self.genes, start=1):
            if not 0 <= g <= self.teacher_layers:
                raise UserError(
                    f"mapping {self}: student layer {m} names teacher layer {g}, but the teacher has layers "
                    f"1..{self.teacher_layers} (0 = no loss for that layer)"
                )

    @property
    def student_layers(self) -> int:
        return len(self.genes)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The active (student layer, teacher layer) pairs, in student order."""
        return tuple((m, g) for m, g in enumerate(self.genes, start=1) if g != SKIP)

    @property
    def followed(self) -> tuple[int, ...]:
        """Kept layers that follow the mapping: each student layer starts from the teacher layer that it learns from,
        from uniform's where it learns from none."""
        guess = uniform(self.student_layers, self.teacher_layers)
        return tuple(gene or other for gene, other in zip(self.genes, guess, strict=True))

    def __str__(self) -> str:
        return _dashed(self.genes)


def _dashed(genes: Sequence[int]) -> str:
    return "-".join(map(str, genes))


def round_half_up(numerator: int, denominator: int) -> int:
    """Returns numerator / denominator, rounded with halves going up (Python's round() goes to even)."""
    return (2 * numerator + denominator) // (2 * denominator)


def uniform(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Returns g(m) = round(m * N / M), half up, for m = 1 to M. N need not be divisible by M."""
    return tuple(round_half_up(m * teacher_layers, student_layers) for m in range(1, student_layers + 1))


def parse_mapping(text: str, *, student_layers: int, teacher_layers: int, key: str = "mapping") -> LayerMapping:
    """Reads the text form `0-5-0-10` or the name of a preset.

    Presets (M student, N teacher layers): `uniform` round(m*N/M); `last` the M top layers; `first` the M bottom
    layers; `last-only` layer N for student layer M, none for the others; `all-last` layer N for every student layer;
    `none` no pair; `random:SEED` uniform genes in 0..N.

    Raises UserError (naming `key`) when the text is neither, has another number of layers, or leaves 0..N.
    """
    M, N = student_layers, teacher_layers
    if text in ("last", "first") and M > N:
        raise UserError(f"{key}={text!r} needs at least as many teacher layers as student layers, got {N} and {M}")
    named: dict[str, Sequence[int]] = {
        "uniform": uniform(M, N),
        "last": range(N - M + 1, N + 1),
        "last-only": [*[SKIP] * (M - 1), N],
        "first": range(1, M + 1),
        "all-last": [N] * M,
        "none": [SKIP] * M,
    }
    if text in named:
        return LayerMapping(tuple(named[text]), N)
    if text.startswith("random:"):
        seed = text.removeprefix("random:")
        if not seed.isdecimal():
            raise UserError(f"{key}={text!r}: the seed after 'random:' must be a whole number, e.g. random:7")
        rng = random.Random(int(seed))
        return LayerMapping(tuple(rng.randint(0, N) for _ in range(M)), N)
    if text == RANDOM_EACH_STEP:
        raise UserError(
            f"{key}={text!r} is not a fixed mapping, and only mapping.hidden takes it: write one, e.g. "
            f"{_dashed(uniform(M, N))}, or one of {', '.join(PRESETS)}"
        )
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise UserError(
            f"{key}={text!r} is not a layer mapping: write one teacher layer per student layer, e.g. "
            f"{_dashed(uniform(M, N))} (0 = none), or one of {', '.join(PRESETS)}"
        )
    if len(parts) != M:
        raise UserError(f"{key}={text!r} has {len(parts)} layers, but the student has {M}")
    try:
        return LayerMapping(tuple(int(part) for part in parts), N)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


@dataclass(frozen=True)
class RandomEachStep(LayerMapping):
    """A mapping for which, at each optimizer step, M of the N teacher layers are drawn and sorted, and student layer m
    learns from the m-th (RAIL-KD, Haidar et al. 2021, arXiv 2109.10164).

    It is the uniform mapping wherever there is no step: held-out losses, and what projections are fitted to.
    """

    @classmethod
    def from_sizes(cls, *, student_layers: int, teacher_layers: int, key: str) -> RandomEachStep:
        """Raises UserError, naming `key`, when there are too few teacher layers to draw from."""
        if student_layers > teacher_layers:
            raise UserError(
                f"{key}={RANDOM_EACH_STEP!r} draws a different teacher layer for each of {student_layers} student "
                f"layers, but the teacher has {teacher_layers}: take a student of fewer layers, or a fixed mapping"
            )
        return cls(uniform(student_layers, teacher_layers), teacher_layers)

    def drawn(self, seed: int, step: int) -> LayerMapping:
        """Returns the mapping of an optimizer step (from 0): a function of the two numbers alone, so that ranks, micro
        batches and resumed runs agree on it without a word."""
        chosen = random.Random(f"{seed}/{step}").sample(range(1, self.teacher_layers + 1), self.student_layers)
        return LayerMapping(tuple(sorted(chosen)), self.teacher_layers)

    @property
    def windows(self) -> tuple[LayerMapping, ...]:
        """The mappings to consecutive teacher layers: few, and every pair of layers that can be drawn is in one."""
        M, N = self.student_layers, self.teacher_layers
        return tuple(LayerMapping(tuple(range(first, first + M)), N) for first in range(1, N - M + 2))

    def __str__(self) -> str:
        return RANDOM_EACH_STEP


@dataclass(frozen=True)
class MappingPair:
    """What a genome says: which teacher layers the hidden-state losses use, and which the attention losses.

    Its text is `0-5-0-10`, or HIDDEN/ATTENTION where the two differ, after `LAYERS@` where it has kept layers.
    """

    hidden: LayerMapping
    attention: LayerMapping
    layers: tuple[int, ...] | None = None
    """Kept layers: the teacher layer that each student layer starts from, 0 = random, as in student.init; None: the
    genome says nothing of it."""

    @classmethod
    def parse(cls, text: str, *, student_layers: int, teacher_layers: int, key: str) -> MappingPair:
        """Reads the text of a genome; each of its parts may be a preset, and LAYERS may be `follow`. Raises UserError
        naming `key`."""
        kept, hidden, attention = _parts(text)
        if attention == "":
            raise UserError(f"{key}: {text!r} has nothing after the slash; write HIDDEN/ATTENTION, or one mapping")
        of = partial(parse_mapping, student_layers=student_layers, teacher_layers=teacher_layers, key=key)
        of_hidden = of(hidden)
        of_attention = of_hidden if attention is None else of(attention)
        if kept is None:
            return cls(of_hidden, of_attention)
        return cls(of_hidden, of_attention, of_hidden.followed if kept == "follow" else of(kept).genes)

    @classmethod
    def from_texts(cls, hidden: str, attention: str | None, *, student_layers: int, teacher_layers: int) -> MappingPair:
        """Reads mapping.hidden and mapping.attention of a configuration, which alone may be random-each-step; no text
        for the attention: the same mapping. Raises UserError naming the key."""
        kept, own, other = _parts(hidden)
        if kept is not None or other is not None:
            parts = {"student.init": kept, "mapping.hidden": own, "mapping.attention": other}
            written = ", ".join(f"{key}={text}" for key, text in parts.items() if text)
            raise UserError(
                f"mapping.hidden={hidden!r} is the text of a genome; here its parts are settings: {written}"
            )
        sizes = {"student_layers": student_layers, "teacher_layers": teacher_layers}
        read = RandomEachStep.from_sizes if hidden == RANDOM_EACH_STEP else partial(parse_mapping, hidden)
        of_hidden = read(**sizes, key="mapping.hidden")
        if attention is None:
            return cls(of_hidden, of_hidden)
        return cls(of_hidden, parse_mapping(attention, **sizes, key="mapping.attention"))

    @staticmethod
    def genes_in(text: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Reads the genes of the hidden states and of the attention, and the kept layers (none: empty), out of the text
        of a pair, which holds no presets; for those who do not know how many layers the models have."""
        kept, hidden, attention = _parts(text)
        parts = (hidden, attention or hidden, kept)
        of_hidden, of_attention, layers = (tuple(map(int, part.split("-"))) if part else () for part in parts)
        return of_hidden, of_attention, layers

    @property
    def separate(self) -> bool:
        """Whether the two mappings differ."""
        return self.hidden != self.attention

    @property
    def file_name(self) -> str:
        return str(self).replace("/", "_")

    @property
    def kept(self) -> str | None:
        """Text of the kept layers, as student.init has it; None where there are none."""
        return None if self.layers is None else _dashed(self.layers)

    def __str__(self) -> str:
        maps = f"{self.hidden}/{self.attention}" if self.separate else str(self.hidden)
        return maps if self.layers is None else f"{self.kept}@{maps}"


def _parts(text: str) -> tuple[str | None, str, str | None]:
    """Returns kept layers, hidden and attention mapping of LAYERS@HIDDEN/ATTENTION; None where the sign is missing."""
    kept, at, maps = text.rpartition("@")
    hidden, slash, attention = maps.partition("/")
    return kept if at else None, hidden, attention if slash else None


def mapping_table(hidden: LayerMapping, attention: LayerMapping) -> list[str]:
    """Returns lines of student layers over the teacher layers that they learn from; · where one learns from none."""
    width = max(2, len(str(hidden.teacher_layers)))
    rows: list[tuple[str, Sequence[int]]] = [("student layer", range(1, hidden.student_layers + 1))]
    if hidden.genes == attention.genes:
        rows.append(("teacher layer", hidden.genes))
    else:
        rows += [("teacher hidden", hidden.genes), ("teacher attention", attention.genes)]
    table = [f"{label:<18}" + " ".join((str(g) if g else "·").rjust(width) for g in genes) for label, genes in rows]
    if isinstance(hidden, RandomEachStep):
        table.append(f"{hidden}: so for held-out losses; each step draws its own, in ascending order")
    return table
