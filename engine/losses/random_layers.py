"""mapping.hidden=random-each-step: the losses of the teacher layers that are drawn for an optimizer step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial, reduce
from operator import or_
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from engine.config.distill import LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.losses.loss_set import LossSet
from engine.mapping import MappingPair, RandomEachStep
from engine.models.features import Features
from engine.models.projections import Projections


def _by_student_layer(names: Iterable[str]) -> tuple[str, ...]:
    """Returns `hidden/1-random` for `hidden/1-3`."""
    return tuple(re.sub(r"-\d+$", "-random", name) for name in names)


class RandomLosses(LossSet):
    """The losses of a batch over the mapping of its step, or over the uniform one where it has no step.

    Every mapping that can be drawn has the same terms in the same order, since the student layers are the same; so
    terms are named by student layer alone, `hidden/1-random`, and each has one curve. Projections start from, and their
    fit is judged by, the pairs of the uniform mapping, which lies in the middle of those that can be drawn; scales are
    measured of every pair, and each draw is divided by its own.
    """

    def __init__(
        self, config: LossConfig, mapping: MappingConfig, *, layers: RandomEachStep, seed: int, **others: Any
    ) -> None:
        """seed: of the draws. others: of LossSet."""
        super().__init__(config, mapping, hidden_map=layers, attention_map=layers, **others)
        self._layers, self._seed = layers, seed
        self._losses_over = partial(LossSet, config, mapping, **others)
        windows = [self._losses_over(hidden_map=window, attention_map=window) for window in layers.windows]
        self.targets = {term: target for window in windows for term, target in window.targets.items()}
        self.wanted_teacher = reduce(or_, (window.wanted_teacher for window in windows))
        self.term_names = _by_student_layer(self.term_names)
        self.observed_names = _by_student_layer(self.observed_names)

    def of_step(self, step: int) -> LossSet:
        """Returns the losses of one draw, with scales."""
        drawn = self._layers.drawn(self._seed, step)
        return self._losses_over(hidden_map=drawn, attention_map=drawn).scaled(self._scales)

    def __call__(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        per_micro: Counts,
        projections: Projections,
        heads: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_batch = super().__call__ if batch.step is None else self.of_step(batch.step)
        return of_batch(student, teacher, batch, per_micro, projections, heads)


def build_losses(
    config: LossConfig, mapping: MappingConfig, layers: MappingPair, *, seed: int = 0, **others: Any
) -> LossSet:
    """Returns the losses over `layers`, which is what `mapping` names for the two models. seed: of the draws of
    random-each-step. others: of LossSet. Raises UserError for what does not fit the models."""
    if isinstance(layers.hidden, RandomEachStep):
        return RandomLosses(config, mapping, layers=layers.hidden, seed=seed, **others)
    return LossSet(config, mapping, hidden_map=layers.hidden, attention_map=layers.attention, **others)
