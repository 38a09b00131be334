"""What every loss is given, and what it has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from engine.config.distill import LossConfig
from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels.choice import Kernels
from engine.kernels.inputs import Attention, Rows
from engine.kernels.segments import Segments
from engine.models.features import Features, Wanted
from engine.models.mlm_head import MlmHead, WholeLogits
from engine.models.own_attention import OwnAttention
from engine.models.pooling import MEAN
from engine.models.projections import Projections
from engine.models.shape import ModelShape

Side = Literal["student", "teacher"]


class Target(NamedTuple):
    """What of the teacher a term is the mean squared distance to."""

    kind: Literal["hidden", "scores"]
    layer: int


@dataclass(frozen=True)
class Pair:
    """One student layer that learns from one teacher layer (both 1-based)."""

    student: int
    teacher: int
    share: float
    """Weight of the layer, divided by the number of active layers when losses are averaged over layers"""

    def layer(self, side: Side) -> int:
        return self.student if side == "student" else self.teacher

    def __str__(self) -> str:
        return f"{self.student}-{self.teacher}"


@dataclass(frozen=True)
class LossSetup:
    """What is known before any model exists."""

    config: LossConfig
    student: ModelShape
    teacher: ModelShape
    hidden: tuple[Pair, ...]
    """Active pairs of the hidden-state mapping."""
    attention: tuple[Pair, ...]
    """Active pairs of the attention mapping."""
    mlm_probability: float
    pooling: tuple[str, ...] = MEAN
    """Ways in which the teacher makes one vector of a text, as sentence-transformers names them"""

    @property
    def own_attention(self) -> dict[Side, OwnAttention]:
        """What is known of the models that compute their attention themselves, by side"""
        shapes: dict[Side, ModelShape] = {"teacher": self.teacher, "student": self.student}
        return {side: shape.own_attention for side, shape in shapes.items() if shape.own_attention is not None}

    @property
    def counts_pads(self) -> bool:
        """Whether TinyBERT's three losses average over all positions, as its released code does."""
        return self.config.preset == "tinybert"


class Evaluated(NamedTuple):
    """What one loss makes of one micro batch."""

    total: torch.Tensor
    """Weighted sum of its terms: a differentiable scalar"""
    terms: dict[str, torch.Tensor]
    """Raw value of each term by its name, before any weight, detached"""
    observed: Mapping[str, torch.Tensor] = MappingProxyType({})
    """Values that are logged beside the terms, likewise"""

    @classmethod
    def weighted(cls, values: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> Evaluated:
        """Returns the result of a loss whose terms have these differentiable values."""
        total = torch.stack([value * weights[name] for name, value in values.items()]).sum()
        return cls(total, {name: value.detach() for name, value in values.items()})


@dataclass(frozen=True)
class StepInputs:
    """One micro batch: what was captured, and what to divide by. Asking for a tensor that was not captured raises
    RuntimeError: a requested loss must never be silently 0."""

    student: Features
    teacher: Features
    batch: Batch
    per_micro: Counts
    """Counts of the global batch / (ranks * accumulation steps)."""
    projections: Projections
    kernels: Kernels = field(default_factory=Kernels)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    """What losses train beside student and projections (Loss.build_head), by their names."""

    @property
    def segments(self) -> Segments | None:
        """Places of the sequences, when at least one side ran without pads; those of the other side are dropped then"""
        return self.student.segments or self.teacher.segments

    @property
    def rows(self) -> Rows:
        """Rows of the captured tensors that are real tokens"""
        if self.segments is None:
            return Rows(mask=self.batch.token_mask)
        return Rows(mask=self.segments.real_rows_on(self.batch.input_ids.device), segments=self.segments)

    def captured(self, loss: str, side: Side, kind: str, layer: int) -> torch.Tensor:
        """Returns Features.<kind>[layer] of one side. Raises RuntimeError when it was not captured."""
        features: Features = getattr(self, side)
        tensors: Mapping[int, torch.Tensor] = getattr(features, kind)
        if layer not in tensors:
            present = ", ".join(map(str, sorted(tensors))) or "none"
            raise RuntimeError(
                f"loss.{loss} needs the {side}'s {kind} of layer {layer}, but it was not captured (captured: {present})"
            )
        tensor = tensors[layer]
        if side == "teacher" and tensor.requires_grad:
            raise RuntimeError(f"loss.{loss}: the teacher's {kind} of layer {layer} has a gradient; it must be frozen")
        if self.segments is not None and features.segments is None:
            tensor = self.segments.packed(tensor, tensor.dim() - 2)
        return tensor

    def hidden_states(self, loss: str, pair: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the student's hidden state pair[0] and the teacher's pair[1]: (B, L, D_s) and (B, L, D_t)."""
        return self.captured(loss, "student", "hidden", pair[0]), self.captured(loss, "teacher", "hidden", pair[1])

    def projected(self, loss: str, layer: int) -> torch.Tensor:
        """Returns the student's hidden state through its projection. Padded tokens are zeroed before: the weight's
        gradient is a sum over all tokens, where 0 * NaN would be NaN."""
        state, mask = self.captured(loss, "student", "hidden", layer), self.rows.mask
        if mask is not None:
            state = state.masked_fill(~mask[:, :, None], 0.0)
        projected: torch.Tensor = self.projections(layer, state)
        return projected

    def attention(self, loss: str, pair: Pair) -> Attention:
        def of(side: Side, kind: str) -> torch.Tensor:
            return self.captured(loss, side, kind, pair.layer(side))

        def scale(side: Side) -> float:
            factors: Mapping[int, float] = getattr(self, side).scaling
            if pair.layer(side) not in factors:
                raise RuntimeError(
                    f"loss.{loss} needs the {side}'s scaling of layer {pair.layer(side)}, but it was not captured"
                )
            return factors[pair.layer(side)]

        tensors = of("student", "query"), of("student", "key"), of("teacher", "query"), of("teacher", "key")
        return Attention(*tensors, scale("student"), scale("teacher"), rows=self.rows)

    def mlm_head(self, loss: str, side: Side, rows: float) -> MlmHead | WholeLogits:
        """Returns the head of one side, whose P positions must be the `rows` that this micro batch has by its own
        count."""
        head = (self.student if side == "student" else self.teacher).mlm_head
        if head is None:
            raise RuntimeError(f"loss.{loss} needs the {side}'s logits (after its last layer), but none were captured")
        if head.positions != rows:
            raise RuntimeError(
                f"loss.{loss}: the {side} has logits at {head.positions} positions, but the micro batch has {rows:g}"
            )
        return head


class Loss(ABC):
    """One objective. Built once, before any model; called once per micro batch."""

    name: ClassVar[str]
    mapped_by: ClassVar[Literal["hidden", "attention"] | None] = None
    """Layer mapping that chooses its pairs; None: it has no layers"""

    def __init__(self, setup: LossSetup) -> None:
        """Raises UserError when the two models cannot be compared in this way. `setup` has at least one pair."""
        self.setup = setup
        self.check()

    def check(self) -> None:
        """Raises UserError when the two models cannot be compared in this way."""
        return

    @property
    def pairs(self) -> tuple[Pair, ...]:
        if self.mapped_by is None:
            return ()
        return self.setup.hidden if self.mapped_by == "hidden" else self.setup.attention

    @property
    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Coefficient of each term by its name under a loss weight of 1, in the order of logging"""

    @abstractmethod
    def wanted(self, side: Side) -> Wanted:
        """Returns what one side has to capture."""

    def build_head(self) -> nn.Module | None:
        """Returns a module that is trained along with the student and never exported, for `StepInputs.heads`; None:
        this loss has no parameters of its own. Its weights may depend on torch's seed alone."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what it leaves out of these two models"""
        return ()

    @property
    def targets(self) -> dict[str, Target]:
        """Targets of the terms that are squared distances, which loss.scale=teacher divides by the target's variance"""
        return {}

    @property
    def state_pairs(self) -> dict[str, tuple[int, int]]:
        """Hidden states (0 = embeddings) that are compared through a projection, the student's and the teacher's, by
        their name in the log."""
        return {}

    @property
    def observed(self) -> dict[str, str]:
        """Names of what it logs beside its terms, and the term in whose unit each is"""
        return {}

    @abstractmethod
    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        """Returns the loss of one micro batch. weights: that of each term in the total."""


OwnLosses = Mapping[type[Loss], float]
"""Losses that a program brings, with their weights (docs/api.md)."""
NO_LOSSES: OwnLosses = MappingProxyType({})


class HiddenMapped(Loss):
    """A loss on each pair of hidden states of the mapping."""

    mapped_by = "hidden"

    @property
    def shares(self) -> dict[str, float]:
        return {f"{self.name}/{pair}": pair.share for pair in self.pairs}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(hidden=frozenset(pair.layer(side) for pair in self.pairs))

    @property
    def state_pairs(self) -> dict[str, tuple[int, int]]:
        return {str(pair): (pair.student, pair.teacher) for pair in self.pairs}


class AttentionMapped(Loss):
    """A loss on queries, keys (and values) of each pair of layers of the mapping."""

    mapped_by = "attention"

    def check(self) -> None:
        for side, own in self.setup.own_attention.items():
            if own.projections is None:
                raise UserError(
                    f"loss.{self.name} compares queries, keys and values, but the {side} (model type "
                    f"{own.model_type!r}) computes its attention itself, and which of its modules make them is not "
                    f"known; switch loss.{self.name} off (0)"
                )

    @property
    def shares(self) -> dict[str, float]:
        return {f"{self.name}/{pair}": pair.share for pair in self.pairs}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(attention=frozenset(pair.layer(side) for pair in self.pairs))
