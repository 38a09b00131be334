"""All losses of a run: what they need captured, and their weighted sum."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from types import MappingProxyType

import torch
from torch import nn

from engine.config.distill import ATTENTION_MAPPED, HIDDEN_MAPPED, LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels.choice import Kernels
from engine.losses.base import NO_LOSSES, Loss, LossSetup, OwnLosses, Pair, StepInputs, Target
from engine.losses.registry import LOSSES
from engine.mapping import LayerMapping
from engine.models.features import Features, Wanted
from engine.models.pooling import MEAN
from engine.models.projections import Projections, check_projection
from engine.models.shape import ModelShape


def active_pairs(
    layer_map: LayerMapping, weights: list[float] | None, *, key: str, average_layers: bool
) -> tuple[Pair, ...]:
    """Returns the pairs of a mapping that have a weight above 0. Raises UserError, naming `key`, for a wrong number of
    weights.

    The divisor of an average is the number of active pairs, not the sum of their weights: doubling every weight
    doubles the loss.
    """
    if weights is None:
        weights = [1.0] * layer_map.student_layers
    if len(weights) != layer_map.student_layers:
        raise UserError(
            f"{key}={weights} has {len(weights)} weights, but the student has {layer_map.student_layers} layers: "
            "give one weight per student layer"
        )
    active = [(m, g, weights[m - 1]) for m, g in layer_map.pairs if weights[m - 1] > 0]
    divisor = len(active) if average_layers else 1
    return tuple(Pair(m, g, weight / divisor) for m, g, weight in active)


def _idle_settings(
    config: LossConfig, mapping: MappingConfig, own: Iterable[type[Loss]], *, projects: bool
) -> list[str]:
    """Returns a sentence for each setting that was given a value and changes nothing."""
    active = config.active
    default = LossConfig()
    projecting = "a loss of hidden states or embeddings"
    idle = []

    def check(key: str, value: object, is_set: bool, used: bool, user: str) -> None:
        if is_set and not used:
            idle.append(f"{key}={value!r} has no effect: {user} is not active")

    check("loss.temperature", config.temperature, config.temperature != 1.0, "logits" in active, "loss.logits")
    check(
        "loss.relation_heads",
        config.relation_heads,
        config.relation_heads is not None,
        "relation" in active,
        "loss.relation",
    )
    check(
        "loss.relation_weights",
        config.relation_weights,
        config.relation_weights != default.relation_weights,
        "relation" in active,
        "loss.relation",
    )
    for name in ("pooled_weights", "pooled_temperature"):
        value = getattr(config, name)
        check(f"loss.{name}", value, value != getattr(default, name), "pooled" in active, "loss.pooled")
    check("loss.projection", config.projection, config.projection is not None, projects, projecting)
    check("loss.projection_bias", config.projection_bias, config.projection_bias is not None, projects, projecting)
    if projects and config.projection == "identity" and config.projection_bias is not None:
        idle.append(f"loss.projection_bias={config.projection_bias} has no effect: loss.projection='identity' has none")
    mapped_by = {LOSSES[name].mapped_by for name in active} | {kind.mapped_by for kind in own}
    check(
        "loss.average_layers",
        config.average_layers,
        config.average_layers is not None,
        bool(mapped_by - {None}),
        "a layer-mapped loss",
    )
    for name, losses in (("hidden", HIDDEN_MAPPED), ("attention", ATTENTION_MAPPED)):
        user = " or ".join(f"loss.{loss}" for loss in losses)
        used = name in mapped_by
        weights = getattr(mapping, f"{name}_weights")
        check(f"mapping.{name}_weights", weights, weights is not None, used, user)
        if name == "attention":
            check("mapping.attention", mapping.attention, mapping.attention is not None, used, user)
        elif mapping.attention is not None:  # otherwise the attention losses read mapping.hidden too
            check("mapping.hidden", mapping.hidden, mapping.hidden != MappingConfig().hidden, used, user)
    return idle


class LossSet:
    """The active losses of a run.

    Built from configuration alone, before any weight is loaded; raises UserError for what cannot work. Then called
    once per micro batch, inside the trained module's forward. total = sum of coefficients * terms, each divided by its
    scale (`scaled`; 1 before).
    """

    observed_names: tuple[str, ...]
    """Names of what is logged beside the terms, e.g. `attention_target/1-3`"""
    term_names: tuple[str, ...]
    """Names of the terms, e.g. `hidden/1-3` (student layer 1, teacher layer 3), `relation/qq/3-12`, `embedding`"""
    held_out_names: tuple[str, ...]
    """Names of the terms of a batch that is in no step"""
    coefficients: tuple[float, ...]
    """Coefficient of each term: loss weight * layer weight / number of active layers (that only when averaged)"""
    wanted_student: Wanted
    wanted_teacher: Wanted
    state_pairs: dict[str, tuple[int, int]]
    """Hidden states (0 = embeddings) that are compared through a projection, by their name in the log."""
    targets: dict[str, Target]
    """Targets of the terms that are mean squared distances"""
    windows: frozenset[int]
    """Windows of student and teacher, in tokens, within which the pairs of tokens of a batch must be counted"""
    warnings: tuple[str, ...]
    """Sentences about settings without effect, and about what losses leave out of these models"""

    def __init__(
        self,
        config: LossConfig,
        mapping: MappingConfig,
        *,
        hidden_map: LayerMapping,
        attention_map: LayerMapping,
        student: ModelShape,
        teacher: ModelShape,
        mlm_probability: float,
        pooling: tuple[str, ...] = MEAN,
        kernels: Kernels | None = None,
        own_losses: OwnLosses = NO_LOSSES,
    ) -> None:
        """kernels: what computes them; unset: those that run anywhere. own_losses: beside those of `config`. pooling:
        the teacher's, as sentence-transformers names it."""
        for layer_map in (hidden_map, attention_map):
            assert (layer_map.student_layers, layer_map.teacher_layers) == (student.layers, teacher.layers), layer_map
        self.config, self.teacher = config, teacher
        self.windows = frozenset(window for window in (*student.windows, *teacher.windows) if window is not None)
        average = config.resolved_average_layers
        setup = LossSetup(
            config=config,
            student=student,
            teacher=teacher,
            hidden=active_pairs(
                hidden_map, mapping.hidden_weights, key="mapping.hidden_weights", average_layers=average
            ),
            attention=active_pairs(
                attention_map, mapping.attention_weights, key="mapping.attention_weights", average_layers=average
            ),
            mlm_probability=mlm_probability,
            pooling=pooling,
        )
        loss_weights = {**config.active, **{kind.name: weight for kind, weight in own_losses.items()}}
        kinds = {**LOSSES, **{kind.name: kind for kind in own_losses}}
        maps = {"hidden": hidden_map, "attention": attention_map}
        self._losses, empty = self._build(setup, loss_weights, kinds, maps)
        self._kernels = kernels
        self.state_pairs = {name: pair for loss in self._losses for name, pair in loss.state_pairs.items()}
        self.targets = {term: target for loss in self._losses for term, target in loss.targets.items()}
        if self.state_pairs:
            check_projection(config.projection, student_width=student.width, teacher_width=teacher.width)
        left_out = (note for loss in self._losses for note in loss.notes)
        idle = _idle_settings(config, mapping, own_losses, projects=bool(self.state_pairs))
        self.warnings = (*empty, *idle, *left_out)
        shares = {term: share for loss in self._losses for term, share in loss.shares.items()}
        self._weights = {term: loss_weights[term.partition("/")[0]] * share for term, share in shares.items()}
        self.term_names, self.coefficients = tuple(self._weights), tuple(self._weights.values())
        self.held_out_names = self.term_names
        self._observed = {name: term for loss in self._losses for name, term in loss.observed.items()}
        self.observed_names = tuple(self._observed)
        self._scales: Mapping[str, float] = {}
        self.wanted_student = reduce(or_, (loss.wanted("student") for loss in self._losses))
        self.wanted_teacher = reduce(or_, (loss.wanted("teacher") for loss in self._losses))

    @staticmethod
    def _build(
        setup: LossSetup,
        active: Mapping[str, float],
        kinds: Mapping[str, type[Loss]],
        maps: Mapping[str, LayerMapping],
    ) -> tuple[list[Loss], list[str]]:
        """Returns the losses that have something to compare, and a warning for each that is on but has no pair of
        layers."""
        losses: list[Loss] = []
        empty = []
        for name, weight in active.items():
            kind = kinds[name].mapped_by
            if any(type(loss) is kinds[name] for loss in losses):
                continue  # one object serves both names
            if kind is not None and not (setup.hidden if kind == "hidden" else setup.attention):
                empty.append(
                    f"loss.{name}={weight:g} has no effect: the {kind} mapping {maps[kind]} has no pair of layers "
                    "with a weight above 0"
                )
            else:
                losses.append(kinds[name](setup))
        if losses:
            return losses, empty
        if not active:
            raise UserError("nothing to learn from: every loss weight is 0; set one of loss." + ", loss.".join(LOSSES))
        raise UserError(
            "nothing to learn from: " + "; ".join(empty) + "; name a teacher layer in mapping.hidden or "
            "mapping.attention, or switch on a loss without layers, like loss.embedding=1"
        )

    @property
    def projected_layers(self) -> frozenset[int]:
        """Student's hidden states (0 = embeddings) for which `projections` must have a map"""
        return frozenset(student for student, _ in self.state_pairs.values())

    @property
    def looks_at_slice(self) -> bool:
        """Whether something is measured on the corpus before the first step (engine/losses/measure.py)"""
        return bool(self.state_pairs or (self.config.scales and self.targets))

    def build_heads(self) -> dict[str, nn.Module]:
        """Returns what losses train beside student and projections, by the name of the loss."""
        heads = {loss.name: loss.build_head() for loss in self._losses}
        return {name: head for name, head in heads.items() if head is not None}

    def scaled(self, scales: Mapping[str, float]) -> LossSet:
        """Returns the same losses with these terms divided by a number each; coefficients stay as they are."""
        found = copy.copy(self)
        found._scales = scales
        found._weights = {term: weight / scales.get(term, 1.0) for term, weight in self._weights.items()}
        return found

    def __call__(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        per_micro: Counts,
        projections: Projections,
        heads: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weighted total of one micro batch (differentiable scalar) and, detached, the raw terms in the
        order of `term_names` and what is observed in that of `observed_names`, (T + O,); all float32 (float64 for
        float64 features), on the student's device and never read here.

        `per_micro` holds the global batch's counts / (ranks * accumulation steps): the mean of `total` over ranks and
        micro batches is then the global mean, and so are its gradient and the terms. heads: as `build_heads` made them.
        """
        inputs = StepInputs(
            student=student,
            teacher=teacher,
            batch=batch,
            per_micro=per_micro,
            projections=projections,
            kernels=self._kernels or Kernels(),
            heads=heads,
        )
        evaluated = [loss(inputs, self._weights) for loss in self._losses]
        values = {name: value for one in evaluated for name, value in (one.terms | dict(one.observed)).items()}
        units = {**dict.fromkeys(self._weights), **self._observed}
        logged = torch.stack([values[name] / self._scales.get(unit or name, 1.0) for name, unit in units.items()])
        return torch.stack([one.total for one in evaluated]).sum(), logged
