"""engine/models/projections.py: what each kind creates, how it starts, and what it computes."""

from __future__ import annotations

import pytest
import torch

from engine.config.distill import LossConfig
from engine.errors import UserError
from engine.models.projections import Projections

ATOL_FLOAT32 = 1e-5


def make(
    layers: tuple[int, ...], *, student: int = 12, teacher: int = 20, seed: int = 0, **options: object
) -> Projections:
    torch.manual_seed(seed)
    return Projections(LossConfig(**options), student_width=student, teacher_width=teacher, layers=layers)


@pytest.mark.parametrize(
    ("kind", "layers", "names"),
    [
        ("shared", (0, 1, 3), {"embedding", "layers"}),
        ("shared", (2, 4), {"layers"}),
        ("shared", (0,), {"embedding"}),
        ("per_layer", (0, 1, 3), {"embedding", "layer_1", "layer_3"}),
        ("per_layer", (2,), {"layer_2"}),
        ("single", (0, 1, 3), {"all"}),
        ("single", (), set()),
    ],
)
def test_creates_only_what_is_used(kind, layers, names):
    projections = make(layers, projection=kind)
    assert set(projections.linears) == names
    assert {name for name, _ in projections.named_parameters()} == {f"linears.{name}.weight" for name in names}


@pytest.mark.parametrize("kind", ["shared", "per_layer", "single"])
def test_each_layer_goes_through_its_own_linear(kind):
    projections = make((0, 1, 3), projection=kind, projection_bias=True)
    name = {
        "shared": {0: "embedding", 1: "layers", 3: "layers"},
        "per_layer": {0: "embedding", 1: "layer_1", 3: "layer_3"},
        "single": {0: "all", 1: "all", 3: "all"},
    }[kind]
    hidden = torch.randn(2, 5, 12)
    with torch.no_grad():
        for linear in projections.linears.values():
            linear.bias.normal_()
    for layer in (0, 1, 3):
        linear = projections.linears[name[layer]]
        want = torch.einsum("bli,oi->blo", hidden, linear.weight) + linear.bias
        assert torch.allclose(projections(layer, hidden), want, atol=ATOL_FLOAT32)


def test_it_takes_what_fits_of_other_projections():
    trained = make((0, 1, 3), projection="per_layer", seed=1)
    state = {**trained.state_dict(), "linears.layer_3.weight": torch.zeros(20, 13)}
    projections, untouched = (make((0, 2, 3), projection="per_layer") for _ in range(2))
    projections.take(state)
    assert torch.equal(projections.linears["embedding"].weight, trained.linears["embedding"].weight)
    for name in ("layer_2", "layer_3"):
        assert torch.equal(projections.linears[name].weight, untouched.linears[name].weight)
    assert [projections.was_trained(layer) for layer in (0, 2, 3)] == [True, False, False]


def test_presets_fix_kind_and_bias():
    clean, tinybert = make((0, 1)), make((0, 1), preset="tinybert", student=20)
    assert clean.kind == "shared"
    assert all(linear.bias is None for linear in clean.linears.values())
    assert set(tinybert.linears) == {"all"}, "one projection, even at equal width"
    assert tinybert.linears["all"].bias.shape == (20,)


def test_identity_is_the_tensor_itself():
    projections = make((0, 2), student=20, projection="identity")
    hidden = torch.randn(2, 5, 20)
    assert projections(2, hidden) is hidden
    assert not list(projections.parameters())


def test_identity_refuses_different_widths():
    with pytest.raises(UserError, match=r"loss\.projection='identity'.*12.*20.*student\.hidden_size=20"):
        make((1,), projection="identity")


def test_a_layer_without_projection_is_refused():
    for kind in ("shared", "identity"):
        with pytest.raises(KeyError, match="hidden state 2, only for"):
            make((0, 1), student=20, projection=kind)(2, torch.randn(1, 1, 20))


def test_the_global_seed_determines_the_weights():
    first, again, other = (make((0, 1, 2), projection="per_layer", seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    reordered = make((2, 0, 1), projection="per_layer", seed=5).state_dict()
    assert all(torch.equal(first[name], reordered[name]) for name in first)


@pytest.mark.parametrize(("student", "teacher"), [(312, 768), (768, 768), (384, 312)])
def test_a_hidden_state_keeps_its_size(student, teacher):
    projections = make((1,), student=student, teacher=teacher, projection_bias=True)
    weight, bias = projections.linears["layers"].weight, projections.linears["layers"].bias
    assert weight.std().item() == pytest.approx(student**-0.5, rel=0.02)
    assert not bias.any()
    assert projections(1, torch.randn(8, 16, student)).square().mean().sqrt().item() == pytest.approx(1.0, rel=0.05)


def test_sixteen_bit_states_meet_float32_weights_in_float32():
    projections = make((1,))
    hidden = torch.randn(2, 5, 12).bfloat16()
    projected = projections(1, hidden)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, projections(1, hidden.float()))
