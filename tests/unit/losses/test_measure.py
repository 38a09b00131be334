"""What is measured on a slice of the corpus before the first step, and what a student then starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import make_batch, tiny_config, tiny_model
from transformers import PreTrainedModel

from engine.config.distill import LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.losses.base import Target
from engine.losses.loss_set import LossSet
from engine.losses.measure import TeacherSlice, begin
from engine.losses.random_layers import RandomLosses
from engine.mapping import MappingPair, RandomEachStep
from engine.models.capture import capture
from engine.models.features import Features, Wanted
from engine.models.hub import shape_of
from engine.models.install import install
from engine.models.projections import Projections
from engine.models.student import new_model

CPU = torch.device("cpu")
MAPPING = "0-1-0-4"


def batches(count: int, **settings: Any) -> list[Batch]:
    """Of different tokens."""
    found = []
    for i in range(count):
        batch = make_batch(sequences=4, **settings)
        ids = (batch.input_ids * (3 * i + 1)) % 40 + 5
        mask = batch.attention_mask
        lengths = tuple(np.full(4, 11) if mask is None else mask.sum(1).numpy())
        counts = Counts.from_lengths(np.array(lengths))
        found.append(replace(batch, input_ids=ids, counts=counts, lengths=tuple(map(int, lengths))))
    return found


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    model = tiny_model("bert", seed=1).double()
    install(model, "eager")
    return model


def passes(model: PreTrainedModel, *, unpadded: bool) -> Callable[[Batch], Features]:
    wanted = Wanted(hidden=frozenset({0, 1, 4}), attention=frozenset({1, 4}))

    def run(batch: Batch) -> Features:
        with torch.no_grad():
            return capture(model, batch, wanted, unpadded=unpadded)

    return run


def learner(width: int = 24, mapping: str = MAPPING, layers: int = 4, **loss: Any) -> Any:
    """A module as far as `begin` looks at it, with a student of this width and so many layers."""
    config = tiny_config("bert")
    config.hidden_size, config.num_hidden_layers = width, layers
    student = new_model(config, False, 0).double()
    install(student, "eager")
    models: dict[str, Any] = {
        "student": shape_of(config, False), "teacher": shape_of(tiny_config("bert"), False), "mlm_probability": 0.0,
    }  # fmt: skip
    maps = MappingPair.from_texts(mapping, None, student_layers=layers, teacher_layers=4).hidden
    settings = LossConfig(**loss), MappingConfig(hidden=mapping)
    if isinstance(maps, RandomEachStep):
        losses: LossSet = RandomLosses(*settings, layers=maps, seed=0, **models)
    else:
        losses = LossSet(*settings, hidden_map=maps, attention_map=maps, **models)
    torch.manual_seed(3)
    projections = Projections(losses.config, student_width=width, teacher_width=48, layers=losses.projected_layers)
    return SimpleNamespace(student=student, projections=projections.double(), losses=losses)


def terms(module: Any, on: list[Batch], teacher: Callable[[Batch], Features]) -> dict[str, float]:
    """Of all batches together, as they are logged."""
    total = sum((batch.counts for batch in on), Counts())
    sums: Any = 0.0
    with torch.no_grad():
        for batch in on:
            features = capture(module.student.eval(), batch, module.losses.wanted_student)
            sums = sums + module.losses(features, teacher(batch), batch, total, module.projections)[1]
    return dict(zip((*module.losses.term_names, *module.losses.observed_names), sums.tolist(), strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("unpadded", [False, True])
def test_variances_are_those_of_real_tokens(teacher: PreTrainedModel, padded: bool, unpadded: bool) -> None:
    on = batches(3, padded=padded)
    found = TeacherSlice(on, passes(teacher, unpadded=unpadded), CPU)
    assert found.tokens == sum(sum(batch.lengths or ()) for batch in on)
    states, scores = [], []
    for batch in on:
        features = passes(teacher, unpadded=False)(batch)
        for row, length in enumerate(batch.lengths or ()):
            states.append(features.hidden[4][row, :length])
            q, k = features.query[4][row, :, :length], features.key[4][row, :, :length]
            scores.append((features.scaling[4] * q @ k.transpose(1, 2)).flatten(1))
    rows, maps = torch.cat(states), torch.cat(scores, dim=1)
    assert found.variance(Target("hidden", 4)) == pytest.approx(float(rows.var(0, correction=0).mean()))
    assert found.variance(Target("scores", 4)) == pytest.approx(float(maps.var(1, correction=0).mean()), rel=1e-5)


def test_what_is_not_finite_is_left_out(teacher: PreTrainedModel) -> None:
    """One sequence that overflows must not make every loss of the run not a number."""
    on, run = batches(3, padded=True), passes(teacher, unpadded=False)
    bad = on[1]

    def overflows(batch: Batch) -> Features:
        features = run(batch)
        if torch.equal(batch.input_ids, bad.input_ids):
            for tensors in (features.hidden, features.query):
                for tensor in tensors.values():
                    tensor[0] = torch.nan
        return features

    assert bad.attention_mask is not None
    rest = replace(
        bad,
        input_ids=bad.input_ids[1:],
        attention_mask=bad.attention_mask[1:],
        lengths=(bad.lengths or ())[1:],
        counts=Counts.from_lengths(np.array((bad.lengths or ())[1:])),
    )
    found, want = TeacherSlice(on, overflows, CPU), TeacherSlice([on[0], rest, on[2]], run, CPU)
    assert (found.tokens, found.left_out) == (want.tokens, (bad.lengths or ())[0])
    for target in (Target("hidden", 4), Target("scores", 4)):
        assert found.variance(target) == pytest.approx(want.variance(target))
    fitted, twin = learner(), learner()
    assert begin(fitted, found).scales == pytest.approx(begin(twin, want).scales)
    for name, weight in fitted.projections.state_dict().items():
        torch.testing.assert_close(weight, twin.projections.state_dict()[name])

    def nothing(batch: Batch) -> Features:
        features = run(batch)
        for tensor in features.hidden.values():
            tensor[:] = torch.nan
        return features

    module = learner()
    before = copy.deepcopy(module.projections.state_dict())
    measured = begin(module, TeacherSlice(on, nothing, CPU))
    assert (measured.scales, measured.tokens, measured.left_out) == ({}, 0, want.tokens + found.left_out)
    assert all(torch.equal(module.projections.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["shared", "per_layer", "single"])
def test_terms_are_shares_of_variance_and_the_fit_is_the_least(teacher: PreTrainedModel, kind: str) -> None:
    on, run = batches(5), passes(teacher, unpadded=False)
    module = learner(projection=kind, projection_bias=True)
    raw = terms(module, on, run)
    measured = begin(module, TeacherSlice(on, run, CPU))
    assert set(measured.explained) == {"2-1", "4-4", "embedding"}
    assert set(measured.scales) == {"hidden/2-1", "hidden/4-4", "attention/2-1", "attention/4-4", "embedding"}
    fitted = terms(module, on, run)
    for name in ("attention/2-1", "attention/4-4"):  # no projection is there
        assert fitted[name] * measured.scales[name] == pytest.approx(raw[name], rel=1e-5)
        target = name.replace("attention", "attention_target")
        assert fitted[target] / fitted[name] == pytest.approx(raw[target] / raw[name], rel=1e-5)
    names = ("hidden/2-1", "hidden/4-4", "embedding")
    least = sum(fitted[name] for name in names)
    assert least < 0.5 * sum(raw[name] / measured.scales[name] for name in names)
    assert max(fitted[name] for name in names) < 1.0, "better than the teacher's mean"
    for linear in module.projections.linears.values():  # no other map is better
        for factor in (0.97, 1.03):
            changed = copy.deepcopy(linear.weight.detach())
            with torch.no_grad():
                linear.weight.mul_(factor)
                assert sum(terms(module, on, run)[name] for name in names) > least
                linear.weight.copy_(changed)


def test_explained_shares_come_from_text_that_the_map_was_not_fitted_on(teacher: PreTrainedModel) -> None:
    """With fewer tokens than dimensions a map explains all that it was fitted on, and nothing else."""
    on, run = batches(5), passes(teacher, unpadded=False)
    shuffled = [replace(batch, input_ids=batch.input_ids.flip(0)) for batch in on]
    module = learner(width=48, projection="per_layer")
    measured = begin(module, TeacherSlice(shuffled, run, CPU))
    trained_on = terms(module, shuffled[:4], run)
    assert 1.0 - trained_on["hidden/4-4"] > measured.explained["4-4"] + 0.1


def test_identity_and_random_maps_are_judged_and_left_alone(teacher: PreTrainedModel) -> None:
    on, run = batches(5), passes(teacher, unpadded=False)
    copied = learner(width=48, mapping="1-2-3-4", projection="identity")
    copied.student.load_state_dict(teacher.state_dict())
    everything = Wanted(hidden=frozenset(range(5)), attention=frozenset({1, 2, 3, 4}))

    def all_layers(batch: Batch) -> Features:
        with torch.no_grad():
            return capture(teacher, batch, everything)

    found = begin(copied, TeacherSlice(on, all_layers, CPU))
    assert all(share == pytest.approx(1.0) for share in found.explained.values()), "the student is the teacher"
    module = learner(projection_init="random", scale="none")
    before = copy.deepcopy(module.projections.state_dict())
    measured = begin(module, TeacherSlice(on, run, CPU))
    assert measured.scales == {}
    assert all(torch.equal(module.projections.state_dict()[name], tensor) for name, tensor in before.items())
    assert max(measured.explained.values()) < 0.0, "a random map is worse than the mean"


def test_scales_are_of_every_layer_that_may_be_drawn_and_the_fit_is_of_the_uniform_mapping(
    teacher: PreTrainedModel,
) -> None:
    everything = Wanted(hidden=frozenset(range(5)), attention=frozenset({1, 2, 3, 4}))

    def run(batch: Batch) -> Features:
        with torch.no_grad():
            return capture(teacher, batch, everything)

    on = batches(5)
    module, fixed = (learner(mapping=mapping, layers=2) for mapping in ("random-each-step", "uniform"))
    slice_of_teacher = TeacherSlice(on, run, CPU)
    measured = begin(module, slice_of_teacher)
    assert set(measured.explained) == {"1-2", "2-4", "embedding"}
    pairs = {(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4)}
    assert set(measured.scales) == {f"{loss}/{m}-{g}" for loss in ("hidden", "attention") for m, g in pairs} | {
        "embedding"
    }
    for m, g in pairs:
        assert measured.scales[f"hidden/{m}-{g}"] == slice_of_teacher.variance(Target("hidden", g))
        assert measured.scales[f"attention/{m}-{g}"] == slice_of_teacher.variance(Target("scores", g))
    begin(fixed, slice_of_teacher)
    weights = fixed.projections.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.projections.state_dict().items())
    held_out, of_uniform = terms(module, on, run), terms(fixed, on, run)
    assert list(held_out.values()) == list(of_uniform.values()), "a batch of no step has the uniform mapping"


def test_tinybert_measures_nothing(teacher: PreTrainedModel) -> None:
    module = learner(preset="tinybert")
    before = copy.deepcopy(module.projections.state_dict())
    measured = begin(module, TeacherSlice(batches(2), passes(teacher, unpadded=False), CPU))
    assert measured.scales == {}
    assert all(torch.equal(module.projections.state_dict()[name], tensor) for name, tensor in before.items())
