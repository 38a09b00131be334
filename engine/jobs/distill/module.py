"""The module that DeepSpeed trains: student and projections, with every loss computed inside `forward`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.data.batch import Batch, Counts
from engine.losses.loss_set import LossSet
from engine.losses.pooled import mapped, vectors_of
from engine.models.capture import capture, hidden_states
from engine.models.features import Features
from engine.models.projections import Projections


class DistilModule(nn.Module):
    """Losses are inside so that ZeRO-3 gathers the projections where they are used. The teacher is not: a submodule
    would be put into train mode, sharded, saved and exported."""

    def __init__(
        self, student: PreTrainedModel, projections: Projections, losses: LossSet, *, unpadded: bool = False
    ) -> None:
        """Takes a student and its projections. unpadded: run padded batches without their pads, as the teacher does."""
        super().__init__()
        self.unpadded = unpadded
        self.student = student
        self.projections = projections
        self.losses = losses
        """Losses; replaced once their scales are known."""
        self.heads = nn.ModuleDict(losses.build_heads())
        """What losses train of their own, and what is never exported."""

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,
        per_micro: Counts | None = None,
        layers: frozenset[int] = frozenset(),
        pooling: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Returns the total (scalar, differentiable) and the value of every term (T,), in its scale, detached, both
        fp32.

        `per_micro`: counts of the global batch divided by (ranks x accumulation), so that DeepSpeed's averages over
        both give the mean over the global batch whatever the split. Without `teacher` and `per_micro`: the student's
        hidden states of `layers` as engine.models.capture.hidden_states returns them, for probes; with `pooling`, the
        (B, W * D_t) vectors of texts that they give in these W ways, through the projection of their layer.
        """
        if teacher is None or per_micro is None:
            states = hidden_states(self.student, batch, layers, unpadded=self.unpadded)
            if not pooling:
                return states
            vectors = (vectors_of(layer_states, None, batch, pooling) for layer_states in states)
            return tuple(
                mapped(self.projections, layer, rows, len(pooling))
                for layer, rows in zip(sorted(layers), vectors, strict=True)
            )
        features = capture(self.student, batch, self.losses.wanted_student, unpadded=self.unpadded)
        return self.losses(features, teacher, batch, per_micro, self.projections, dict(self.heads.items()))
