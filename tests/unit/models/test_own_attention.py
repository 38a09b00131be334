"""Encoders that compute their attention themselves: what is captured is what they compute with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_encoders import OWN_PROJECTIONS, WITHOUT_PROJECTIONS, batch_with_lengths, make_batch, tiny_config, tiny_model
from transformers import DebertaV2Config, PreTrainedModel, XLNetConfig

from engine.config.distill import LossConfig, MappingConfig
from engine.errors import UserError
from engine.jobs.execution import attention_backend
from engine.losses.attention import AttentionScoreLoss
from engine.losses.base import NO_LOSSES, AttentionMapped, OwnLosses
from engine.losses.loss_set import LossSet
from engine.mapping import parse_mapping
from engine.models.capture import capture, layer_modules
from engine.models.features import Wanted
from engine.models.fit import CHECKS, Parts, check_fit
from engine.models.hub import SavedModel, shape_of
from engine.models.install import install, runs_unpadded
from engine.models.own_attention import PROJECTIONS
from engine.models.student import new_model

ALL_LAYERS = frozenset(range(1, 5))


@pytest.mark.parametrize("family", WITHOUT_PROJECTIONS)
@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states_are_the_models_own(family: str, padded: bool) -> None:
    model, batch = tiny_model(family), make_batch(padded=padded)
    install(model, "own")
    with torch.no_grad():
        want = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
        got = capture(model, batch, Wanted(hidden=frozenset(range(5)))).hidden
    assert all(torch.equal(got[layer], want[layer]) for layer in range(5))
    with pytest.raises(RuntimeError, match="not captured"):
        capture(model, batch, Wanted(attention=frozenset({1})))


@pytest.mark.parametrize("family", WITHOUT_PROJECTIONS)
def test_logits_are_the_models_own(family: str) -> None:
    model, batch = tiny_model(family, mlm=True), make_batch(labels=0.4)
    install(model, "own")
    assert batch.labels is not None
    with torch.no_grad():
        want = model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.labels != -100]
        got = capture(model, batch, Wanted(logits=True)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def without_added_terms(model: PreTrainedModel) -> None:
    """Zeroes what makes the terms beside Q K^T: MPNet's table; DeBERTa's relative positions and all biases of Q."""
    for name, parameter in model.named_parameters():
        if (
            "relative_attention_bias" in name
            or name.startswith("encoder.LayerNorm")
            or name.endswith("query_proj.bias")
        ):
            parameter.data.zero_()


@pytest.mark.parametrize("family", OWN_PROJECTIONS)
def test_scores_are_the_models_own_without_their_added_terms(family: str) -> None:
    model, batch = tiny_model(family), make_batch(padded=False)
    install(model, "own")

    def largest_difference() -> float:
        with torch.no_grad():
            want = model(batch.input_ids, output_attentions=True).attentions
            got = capture(model, batch, Wanted(attention=ALL_LAYERS))
        scores = (got.query[layer] @ got.key[layer].mT * got.scaling[layer] for layer in range(1, 5))
        return max(float((s.softmax(-1) - p).abs().max()) for s, p in zip(scores, want, strict=True))

    assert largest_difference() > 0.01, "the added terms matter"
    without_added_terms(model)
    assert largest_difference() < 1e-6


@pytest.mark.parametrize("family", OWN_PROJECTIONS)
def test_values_are_the_projection_of_the_layers_input(family: str) -> None:
    model, batch = tiny_model(family), make_batch()
    install(model, "own")
    with torch.no_grad():
        got = capture(model, batch, Wanted(frozenset(range(4)), ALL_LAYERS, values=True))
        for number, layer in enumerate(layer_modules(model), start=1):
            want = layer.get_submodule(PROJECTIONS[family].value)(got.hidden[number - 1])
            assert torch.equal(got.value[number].transpose(1, 2).flatten(2), want)


@pytest.mark.parametrize("family", [*OWN_PROJECTIONS, *WITHOUT_PROJECTIONS])
def test_pads_stay_in(family: str) -> None:
    model = tiny_model(family)
    install(model, "own")
    assert not runs_unpadded(model)
    assert capture(model, batch_with_lengths(), Wanted(hidden=frozenset({4}))).hidden[4].shape == (3, 11, 48)


def build(losses: dict[str, float], teacher: str, student: str = "bert", own: OwnLosses = NO_LOSSES) -> LossSet:
    layers = parse_mapping("uniform", student_layers=4, teacher_layers=4)
    return LossSet(
        LossConfig(**{"hidden": 0.0, "attention": 0.0, "embedding": 0.0} | losses),
        MappingConfig(),
        hidden_map=layers,
        attention_map=layers,
        student=shape_of(tiny_config(student), True),
        teacher=shape_of(tiny_config(teacher), True),
        mlm_probability=0.15,
        own_losses=own,
    )


@pytest.mark.parametrize("loss", ["attention", "attention_probs", "relation"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_losses_of_attention_need_known_projections(loss: str, side: str) -> None:
    with pytest.raises(
        UserError, match=rf"^loss.{loss} .* the {side} \(model type 'deberta'\).*switch loss.{loss} off "
    ):
        build({loss: 1.0}, **{"teacher": "bert", side: "deberta"})


def test_so_does_a_loss_that_a_program_brings() -> None:
    class OfQueries(AttentionScoreLoss):
        name = "of_queries"

        def check(self) -> None:
            AttentionMapped.check(self)

    with pytest.raises(UserError, match=r"^loss.of_queries compares queries.*the teacher \(model type 'deberta'\)"):
        build({"hidden": 1.0}, "deberta", own={OfQueries: 1.0})


@pytest.mark.parametrize("family", OWN_PROJECTIONS)
def test_added_terms_are_named_or_refused(family: str) -> None:
    with pytest.raises(UserError, match=rf"loss.attention_probs=1 .* scores of the teacher \({family}\) also have .*"):
        build({"attention_probs": 1.0}, family)
    assert build({"relation": 1.0, "hidden": 1.0}, family).warnings == ()
    for student, sides in (("bert", ["teacher"]), (family, ["teacher", "student"])):
        notes = build({"attention": 1.0}, family, student).warnings
        said = [f"the scores of the {side} ({family}) have" in note for side, note in zip(sides, notes, strict=True)]
        assert said == [True] * len(sides)
        assert all(PROJECTIONS[family].added in note for note in notes)


def test_content_alone_is_no_added_term() -> None:
    config = tiny_config("deberta-v2")
    config.relative_attention = False
    own = shape_of(config, False).own_attention
    assert own is not None
    assert own.added == ""


def test_the_attention_function_cannot_be_chosen() -> None:
    shape = shape_of(tiny_config("mpnet"), False)
    chosen = attention_backend("auto", "float32", shape, 128, key="teacher.attention")
    assert chosen == ("own", "model type 'mpnet' computes its attention itself")
    with pytest.raises(UserError, match=r"^teacher.attention='sdpa': model type 'mpnet' .*write auto$"):
        attention_backend("sdpa", "float32", shape, 128, key="teacher.attention")


SIZES = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DebertaV2Config(**SIZES, conv_kernel_size=3), "hidden states are not the outputs of its layers"),
        (XLNetConfig(vocab_size=53, d_model=16, n_layer=3, n_head=2, d_inner=16), "hidden states are not the outputs"),
    ],
    ids=["convolution after a layer", "another order of axes"],
)
def test_other_hidden_states_are_refused_before_a_run(config: object, reason: str, tmp_path: Path) -> None:
    new_model(config, with_mlm_head=False, seed=0).save_pretrained(tmp_path)  # type: ignore[arg-type]
    saved = SavedModel.read("teacher.path", str(tmp_path))
    checks = [check for check in CHECKS if check.between[1] == "attention"]
    with pytest.raises(UserError, match=f"teacher.path=.*{reason}"):
        check_fit(Parts(None, (saved,)), checks)  # type: ignore[arg-type]
