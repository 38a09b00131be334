"""What is measured once, before the first step, on a slice of the corpus: by how much the teacher's states and scores
vary, which their losses are divided by (loss.scale=teacher), and the linear maps that projections start as
(loss.projection_init=fitted)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel

from engine.config.distill import LossConfig
from engine.data.batch import Batch
from engine.kernels.inputs import Rows
from engine.kernels.reference import outside
from engine.losses.base import Target
from engine.losses.loss_set import LossSet
from engine.models.capture import capture
from engine.models.features import Features, Wanted
from engine.models.install import runnable_anywhere
from engine.models.moments import LinearMap, Moments, fit
from engine.models.projections import Projections
from engine.models.shape import ModelShape
from engine.ranks.collectives import from_rank_zero

EVERY_FIFTH = 5
"""Number of batches of which one judges a map that was fitted on the others."""


@dataclass(frozen=True)
class Measured:
    """What was measured; kept in checkpoints, so that a continued run divides by the same numbers."""

    scales: dict[str, float] = field(default_factory=dict)
    """Variance of each term's target; empty with loss.scale=none"""
    explained: dict[str, float] = field(default_factory=dict)
    """R^2 of each pair of layers, or `embedding`: the share of the teacher's variance that the initial student's state
    explains through its projection, on text that the projection was not fitted on."""
    tokens: int = 0
    """Tokens that were looked at"""
    left_out: int = 0
    """Tokens whose states are not finite"""


class TeacherSlice:
    """A slice of the corpus, and what the teacher makes of it; one for all students of a cohort."""

    def __init__(
        self,
        batches: Iterable[Batch],
        teacher: Callable[[Batch], Features],
        device: torch.device,
        shape: ModelShape | None = None,
    ) -> None:
        """shape: of the teacher; unset: its layers attend to all tokens."""
        self.batches: list[Batch] = []
        """Batches of the slice, on the CPU"""
        self.hidden: list[dict[int, torch.Tensor]] = []
        """States (n, D) of real tokens by batch and layer, on the CPU"""
        self.finite: list[torch.Tensor] = []
        """Whether all states of a token are finite, (n,) bool by batch; the others are not looked at, since one of them
        would make every scale and every map not a number."""
        self._scores: dict[int, _Spread] = {}
        for batch in batches:
            features = teacher(batch.to(device))
            self.batches.append(batch)
            states = {layer: real_rows(x, batch, features).cpu() for layer, x in features.hidden.items()}
            self.hidden.append(states)
            self.finite.append(finite_rows(list(states.values()), int(batch.counts.tokens)))
            for layer in features.query:
                spread = self._scores.setdefault(layer, _Spread(shape.window(layer) if shape else None))
                spread.add(features, layer, Rows(batch.to(device).token_mask, features.segments))

    @property
    def tokens(self) -> int:
        """Tokens that are looked at"""
        return sum(int(finite.sum()) for finite in self.finite)

    @property
    def left_out(self) -> int:
        return sum(len(finite) for finite in self.finite) - self.tokens

    def variance(self, target: Target) -> float:
        """Returns that of hidden states about their mean, averaged over dimensions; of attention scores about the mean
        of their head, over all pairs of real tokens that its layer attends to."""
        if target.kind == "scores":
            return self._scores[target.layer].variance
        kept = zip(self.hidden, self.finite, strict=True)
        rows = torch.cat([states[target.layer][finite] for states, finite in kept]).double()
        return float(rows.var(0, correction=0).mean())


class _Spread:
    """Sums of attention scores within a window (None: of all) and of their squares, head by head."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._count = 0
        self._sums: torch.Tensor = torch.zeros(())
        self._squares: torch.Tensor = torch.zeros(())

    def add(self, features: Features, layer: int, rows: Rows) -> None:
        query, key = features.query[layer], features.key[layer]
        if rows.segments is not None:
            query, key = (rows.segments.padded(x, 2) for x in (query, key))
            lengths = list(rows.segments.lengths)
        else:
            lengths = [query.shape[2]] * len(query) if rows.mask is None else rows.mask.sum(1).tolist()
        groups = query.shape[1] // key.shape[1]
        for q, k, length in zip(query, key, lengths, strict=True):
            wide = k[:, :length].float().repeat_interleave(groups, dim=0)
            scores = (features.scaling[layer] * q[:, :length].float() @ wide.transpose(1, 2)).double()
            if self._window is None:
                scores = scores.flatten(1)
            else:
                positions = torch.arange(length, device=scores.device)
                scores = scores[:, ~outside(self._window, positions, positions)]
            if not bool(torch.isfinite(scores).all()):
                continue
            self._sums = self._sums + scores.sum(1).cpu()
            self._squares = self._squares + scores.square().sum(1).cpu()
            self._count += scores.shape[1]

    @property
    def variance(self) -> float:
        """Variance of the scores; 0 where none was finite"""
        if not self._count:
            return 0.0
        return float((self._squares / self._count - (self._sums / self._count).square()).mean())


def real_rows(states: torch.Tensor, batch: Batch, features: Features) -> torch.Tensor:
    """Returns (n, D): the states of the batch's real tokens, sequence by sequence, whether or not it ran with its
    pads."""
    if features.segments is not None:
        return states[0, : features.segments.tokens]
    return states.flatten(0, 1) if batch.token_mask is None else states[batch.token_mask.to(states.device)]


def finite_rows(states: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Returns (n,) bool: where all of `states` (n, D) are finite. count: n, for no states."""
    finite = torch.ones(count, dtype=torch.bool)
    for rows in states:
        finite &= torch.isfinite(rows).all(1)
    return finite


@torch.no_grad()
def student_moments(
    student: PreTrainedModel, on: TeacherSlice, pairs: dict[str, tuple[int, int]]
) -> dict[str, tuple[Moments, Moments]]:
    """Returns the moments of every pair of layers over the batches that a map is fitted on, and over those that judge
    it; without pairs of which no state is finite. The student lies on the CPU, in fp32, and runs without dropout."""
    wanted = Wanted(hidden=frozenset(layer for layer, _ in pairs.values()))
    parts: dict[str, tuple[list[Moments], list[Moments]]] = {name: ([], []) for name in pairs}
    was_training = student.training
    student.eval()
    try:
        with runnable_anywhere(student):
            for i, (batch, targets, finite) in enumerate(zip(on.batches, on.hidden, on.finite, strict=True)):
                features = capture(student, batch, wanted)
                judges = len(on.batches) > 1 and i % EVERY_FIFTH == EVERY_FIFTH - 1
                for name, (layer, teacher_layer) in pairs.items():
                    states = real_rows(features.hidden[layer], batch, features)
                    kept = finite & finite_rows([states], len(states))
                    if bool(kept.any()):
                        parts[name][judges].append(Moments.from_states(states[kept], targets[teacher_layer][kept]))
    finally:
        student.train(was_training)
    return {
        name: (_total(fitted or judging), _total(judging or fitted))
        for name, (fitted, judging) in parts.items()
        if fitted or judging
    }


def _total(moments: Sequence[Moments]) -> Moments:
    total = moments[0]
    for one in moments[1:]:
        total = total + one
    return total


class Learner(Protocol):
    """A module that is about to be trained: DistilModule or TaskModule."""

    student: PreTrainedModel
    projections: Projections
    losses: LossSet


def begin(module: Learner, on: TeacherSlice) -> Measured:
    """Measures a new student on rank 0, on the CPU, before DeepSpeed shards it; its projections then start as what was
    fitted, and its losses know their scales. Collective."""
    measured, maps = from_rank_zero(lambda: _measure(module, on))
    module.projections.start_from(maps)
    module.losses = module.losses.scaled(measured.scales)
    return measured


def _measure(module: Learner, on: TeacherSlice) -> tuple[Measured, dict[int, LinearMap]]:
    """Returns what is to be known, and the map of each of the student's hidden states that projections are to start
    from (none where they are random, or the identity)."""
    losses, projections, config = module.losses, module.projections, module.losses.config
    if not on.tokens:  # the first step says what is not finite, and where
        return Measured(left_out=on.left_out), {}
    variances = {term: on.variance(target) for term, target in losses.targets.items()} if config.scales else {}
    scales = {term: variance for term, variance in variances.items() if variance > 0}
    found = student_moments(module.student, on, losses.state_pairs) if losses.state_pairs else {}
    explained: dict[str, float] = {}
    maps: dict[int, LinearMap] = {}
    layers = {name: layer for name, (layer, _) in losses.state_pairs.items() if name in found}
    for names in projections.sharing(layers):
        judging = {name: found[name][1] for name in names}
        weights = [1.0 / judging[name].variance if config.scales else 1.0 for name in names]
        if config.fits_projections and projections.linears and not projections.was_trained(layers[names[0]]):
            bias = projections.has_bias
            trial = fit([found[name][0] for name in names], weights, bias=bias)
            whole = fit([found[name][0] + found[name][1] for name in names], weights, bias=bias)
            maps |= {layers[name]: whole for name in names}
        else:
            trial = projections.as_map(layers[names[0]])
        explained |= {name: judging[name].explained(trial) for name in names}
    return Measured(scales, explained, on.tokens, on.left_out), maps


def sequences_of(config: LossConfig, length: float) -> int:
    """Returns how many sequences of this length make a slice."""
    return math.ceil(config.slice_tokens / length)
