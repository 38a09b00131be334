"""Losses of the one vector that a sentence encoder makes of a text: student against teacher, text by text, and in how
the texts of a batch are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, normalize

from engine.data.batch import Batch
from engine.kernels.segments import Segments
from engine.losses.base import Evaluated, Loss, Side, StepInputs
from engine.models.features import Wanted
from engine.models.pooling import pool
from engine.models.projections import Projections
from engine.ranks.collectives import gather_vectors

KINDS = ("cosine", "mse", "similarity")
"""Names in the log, in the order of loss.pooled_weights."""

FEWEST_TEXTS = 3
"""Texts that similarity needs: the softmax over a single other text is 1 whatever the vectors are."""


class PooledLoss(Loss):
    """Pooled last hidden states, in float32. The student's go through the projection of its last layer, which the
    export keeps as a Dense layer behind the pooling."""

    name = "pooled"

    @property
    def _active(self) -> dict[str, float]:
        weights = zip(KINDS, self.setup.config.pooled_weights, strict=True)
        return {f"{self.name}/{kind}": weight for kind, weight in weights if weight > 0}

    @property
    def shares(self) -> dict[str, float]:
        return self._active

    def _last(self, side: Side) -> int:
        return self.setup.student.layers if side == "student" else self.setup.teacher.layers

    def wanted(self, side: Side) -> Wanted:
        return Wanted(hidden=frozenset({self._last(side)}))

    @property
    def state_pairs(self) -> dict[str, tuple[int, int]]:
        return {self.name: (self._last("student"), self._last("teacher"))}

    def _vectors(self, inputs: StepInputs, side: Side) -> torch.Tensor:
        """Returns the (B, W * D) vectors of one side, W ways of pooling."""
        states = inputs.captured(self.name, side, "hidden", self._last(side))
        return vectors_of(states, inputs.segments, inputs.batch, self.setup.pooling)

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        target = self._vectors(inputs, "teacher")
        layer, ways = self._last("student"), len(self.setup.pooling)
        student = mapped(inputs.projections, layer, self._vectors(inputs, "student"), ways)
        student = student.to(target.dtype)  # where 16 bits are the type of a matrix product
        values = {}
        for term in self._active:
            kind = term.rpartition("/")[2]
            values[term] = self._sum(kind, student, target) / inputs.per_micro.sequences
        return Evaluated.weighted(values, weights)

    def _sum(self, kind: str, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the texts of a batch of one kind."""
        if kind == "cosine":
            return (1.0 - cosine_similarity(student, target)).sum()
        if kind == "mse":
            return (student - target).square().mean(1).sum()
        return similarity_kl(student, target, self.setup.config.pooled_temperature)


def vectors_of(states: torch.Tensor, segments: Segments | None, batch: Batch, ways: Sequence[str]) -> torch.Tensor:
    """Returns the (B, W * D) vectors of the texts of a batch, of states (B, L, D), or (1, T, D) without pads, whose
    places are `segments`."""
    if segments is None:
        return pool(states, batch.attention_mask, ways)
    return pool(segments.padded(states, 1), segments.mask_on(states.device), ways)


def mapped(projections: Projections, layer: int, vectors: torch.Tensor, ways: int) -> torch.Tensor:
    """Returns the (B, W * D_t) vectors that the student's (B, W * D_s) are compared as and that its export makes: each
    of the W through the projection of `layer`."""
    through: torch.Tensor = projections(layer, vectors.view(len(vectors), ways, vectors.shape[1] // ways))
    return through.flatten(1)


def similarity_kl(student: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns the sum over the rows (B, D) of KL(teacher || student) of the softmax of the cosines of a text to all
    other texts, divided by the temperature (SEED, arXiv 2101.04731, with the batch in place of its queue).

    In training the others are those of all ranks' micro batches, whose number must be the same on every rank; their
    gradients are exchanged too, so that the mean over ranks has the gradient of the batch as a whole.
    """
    student, target = normalize(student, dim=1), normalize(target, dim=1)
    together = torch.is_grad_enabled() and student.requires_grad
    columns, first = gather_vectors(student) if together else (student, 0)
    target_columns = gather_vectors(target)[0] if together else target
    if len(columns) < FEWEST_TEXTS:
        return student.sum() * 0.0
    itself = torch.arange(len(student), device=student.device) + first
    others = torch.arange(len(columns), device=student.device) != itself[:, None]
    shape = len(student), len(columns) - 1

    def log_shares(rows: torch.Tensor, all_rows: torch.Tensor) -> torch.Tensor:
        return log_softmax((rows @ all_rows.T)[others].view(shape) / temperature, dim=1)

    return kl_div(log_shares(student, columns), log_shares(target, target_columns), reduction="sum", log_target=True)
