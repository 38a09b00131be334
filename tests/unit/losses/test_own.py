"""Losses that a program brings: what is refused, and what tells them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from engine.config.distill import LOSS_NAMES, LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels import reference
from engine.losses.base import AttentionMapped, Evaluated, HiddenMapped, Loss, OwnLosses, Side, StepInputs
from engine.losses.loss_set import LossSet
from engine.losses.own import check_own_losses, identity_of
from engine.mapping import parse_mapping
from engine.models.features import Features, Wanted
from engine.models.projections import Projections
from engine.models.shape import ModelShape

STUDENT = ModelShape(layers=2, width=6, heads=2, vocab=31, has_mlm_head=False)
TEACHER = ModelShape(layers=4, width=10, heads=2, vocab=31, has_mlm_head=False)
OFF = dict.fromkeys(LOSS_NAMES, 0.0)


class Angle(HiddenMapped):
    """The cosine loss, written anew."""

    name = "angle"

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values = {}
        for pair in self.pairs:
            _, target = inputs.hidden_states(self.name, (pair.student, pair.teacher))
            cosine = nn.functional.cosine_similarity(inputs.projected(self.name, pair.student), target, dim=-1)
            values[f"{self.name}/{pair}"] = (1 - cosine).sum() / inputs.per_micro.tokens
        return Evaluated.weighted(values, weights)


class Headed(Loss):
    """Distance of the embeddings through a map of its own."""

    name = "headed"
    shares = {"headed": 1.0}  # noqa: RUF012

    def wanted(self, side: Side) -> Wanted:
        return Wanted(hidden=frozenset({0}))

    def build_head(self) -> nn.Module:
        return nn.Linear(self.setup.student.width, self.setup.teacher.width)

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        state, target = inputs.hidden_states(self.name, (0, 0))
        return Evaluated.weighted({self.name: (inputs.heads[self.name](state) - target).square().mean()}, weights)


def make_set(own: OwnLosses, *, hidden: str = "uniform", **loss: Any) -> LossSet:
    layers = parse_mapping(hidden, student_layers=2, teacher_layers=4)
    return LossSet(
        LossConfig(**{**OFF, **loss}),
        MappingConfig(hidden=hidden),
        hidden_map=layers,
        attention_map=layers,
        student=STUDENT,
        teacher=TEACHER,
        mlm_probability=0.0,
        own_losses=own,
    )


def states(shape: ModelShape) -> Features:
    torch.manual_seed(shape.width)
    return Features(hidden={layer: torch.randn(2, 3, shape.width) for layer in range(shape.layers + 1)})


def test_terms_are_weighted_and_logged_as_those_of_the_settings() -> None:
    losses = make_set({Angle: 0.5, Headed: 2.0}, cosine=3.0)
    assert losses.term_names == ("cosine/1-2", "cosine/2-4", "angle/1-2", "angle/2-4", "headed")
    assert losses.coefficients == (1.5, 1.5, 0.25, 0.25, 2.0)
    heads = losses.build_heads()
    assert list(heads) == ["headed"]
    torch.manual_seed(0)
    projections = Projections(LossConfig(), student_width=6, teacher_width=10, layers=losses.projected_layers)
    batch = Batch(torch.ones(2, 3, dtype=torch.long), None, None, Counts(sequences=2, tokens=6))
    student, teacher = states(STUDENT), states(TEACHER)
    total, values = losses(student, teacher, batch, batch.counts, projections, heads)
    torch.testing.assert_close(values[:2], values[2:4])
    torch.testing.assert_close(
        values[3],
        reference.hidden_cosine(projections(2, student.hidden[2]), teacher.hidden[4], None, 6.0).detach(),
    )
    torch.testing.assert_close(total.detach(), values @ torch.tensor(losses.coefficients))
    total.backward()
    assert heads["headed"].weight.grad is not None


def test_an_own_loss_uses_the_mapping_and_may_be_the_only_one() -> None:
    alone = make_set({Angle: 1.0}, hidden="0-3")
    assert alone.term_names == ("angle/2-3",)
    assert alone.warnings == ()
    with pytest.raises(UserError, match=r"nothing to learn from: loss\.angle=1 has no effect: the hidden mapping"):
        make_set({Angle: 1.0}, hidden="none")


class NoName(HiddenMapped):
    __call__ = Angle.__call__


class Taken(NoName):
    name = "temperature"


class Slashed(NoName):
    name = "a/b"


class Twin(AttentionMapped):
    name = "angle"
    __call__ = Angle.__call__


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({nn.Linear: 1.0}, "is not a loss; give a class that extends Loss of engine/losses/base.py"),
        ({"angle": 1.0}, "own_losses: 'angle' is not a loss"),
        ({NoName: 1.0}, "NoName.name='': write a name of a-z, 0-9 and _"),
        ({Slashed: 1.0}, "Slashed.name='a/b': write a name of a-z, 0-9 and _"),
        ({Taken: 1.0}, "Taken.name='temperature' is taken; write another name"),
        ({Angle: 1.0, Twin: 1.0}, "Twin.name='angle' is taken; write another name"),
        ({Angle: 0}, "the weight of Angle is 0; write a number above 0"),
        ({Angle: float("nan")}, "the weight of Angle is nan; write a number above 0"),
        ({Angle: "1"}, "the weight of Angle is '1'; write a number above 0"),
    ],
    ids=str,
)
def test_what_is_no_own_loss_is_refused(own: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_own_losses(own)


def test_name_weight_and_source_tell_losses_apart() -> None:
    class Other(Angle):
        def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
            return super().__call__(inputs, weights)

    angle, other = identity_of({Angle: 0.5}), identity_of({Other: 0.5})
    assert angle == identity_of({Angle: 0.5})
    assert angle["loss.angle"] == 0.5
    assert angle.keys() == other.keys() == {"loss.angle", "loss.angle.source"}
    assert angle["loss.angle.source"] != other["loss.angle.source"]


def test_a_loss_without_source_is_refused() -> None:
    space: dict[str, Any] = {"HiddenMapped": HiddenMapped, "call": Angle.__call__}
    exec("class Typed(HiddenMapped):\n    name = 'typed'\n    __call__ = call", space)
    with pytest.raises(UserError, match="the source of Typed cannot be read"):
        check_own_losses({space["Typed"]: 1.0})
