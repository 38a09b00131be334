"""Losses on attention of models with local layers, against the attention that the models themselves compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoders import make_batch, tiny_model
from transformers import MistralConfig, PreTrainedModel

from engine.config.distill import LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels.choice import Kernels
from engine.losses.loss_set import LossSet
from engine.losses.measure import TeacherSlice
from engine.mapping import parse_mapping
from engine.models.attention import Recorder
from engine.models.capture import FULL_FROM, capture, inputs_of, segments_of
from engine.models.features import Features, Wanted
from engine.models.hub import shape_of
from engine.models.install import install, runs_unpadded
from engine.models.projections import Projections

LAYERS = (None, 4, 4, None)
"""Of the tiny ModernBERT: tokens to each side, from its local_attention of 8."""
PAIRS = {"1-4": "whole, whole", "2-3": "local, local", "3-1": "local student", "4-2": "local teacher"}
LENGTH = 31


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    student, teacher = (tiny_model("modernbert", seed=seed).double() for seed in (0, 1))
    for model in (student, teacher):
        install(model, "eager")
    return student, teacher


def long_batch(*, padded: bool) -> Batch:
    batch = make_batch(length=LENGTH, padded=padded)
    lengths = (LENGTH,) * 3 if batch.attention_mask is None else tuple(batch.attention_mask.sum(1).tolist())
    return replace(batch, lengths=lengths, counts=Counts.from_lengths(np.array(lengths), windows=(4,)))


def own_attention(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, ...]:
    """(B, H, L, L) probabilities of each layer, by transformers."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = model(**inputs_of(batch), output_attentions=True).attentions
    model.set_attn_implementation("mapdistill_eager")
    return found


def losses_of(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, backend: str, *, unpadded: bool = False
) -> dict[str, float]:
    shape, mapping = shape_of(student.config, False), "4-3-1-2"
    assert shape.windows == LAYERS
    config = LossConfig(hidden=0, embedding=0, attention=1, attention_probs=1, scale="none")
    layer_map = parse_mapping(mapping, student_layers=4, teacher_layers=4, key="mapping")
    losses = LossSet(
        config, MappingConfig(hidden=mapping), hidden_map=layer_map, attention_map=layer_map, student=shape,
        teacher=shape, mlm_probability=0.0, kernels=Kernels(backend),
    )  # fmt: skip
    assert losses.windows == {4}
    features = capture(student, batch, losses.wanted_student, unpadded=unpadded)
    with torch.no_grad():
        targets = capture(teacher, batch, losses.wanted_teacher, unpadded=unpadded)
    projections = Projections(config, student_width=48, teacher_width=48, layers=frozenset())
    _, values = losses(features, targets, batch, batch.counts, projections)
    return dict(zip((*losses.term_names, *losses.observed_names), values.tolist(), strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_probabilities_are_those_that_the_models_compute(backend: str, padded: bool) -> None:
    student, teacher = models()
    batch = long_batch(padded=padded)
    own_s, own_t = own_attention(student, batch), own_attention(teacher, batch)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if batch.token_mask is None else batch.token_mask
    found = losses_of(student, teacher, batch, backend)
    for pair in PAIRS:
        p_s, p_t = own_s[int(pair[0]) - 1], own_t[int(pair[2]) - 1]
        seen = (p_s > 0) & real[:, None, :, None] & real[:, None, None, :]
        assert bool(seen.all()) == (not padded and LAYERS[int(pair[0]) - 1] is None), "a window is at work"
        p_t = torch.where(seen, p_t, 0.0)
        p_t = p_t / p_t.sum(-1, keepdim=True).clamp_min(1e-300)  # a change only where the student's window is narrower
        want = (torch.special.xlogy(p_t, p_t) - torch.special.xlogy(p_t, p_s)).sum() / (4 * batch.counts.tokens)
        # the models' softmax is in float32
        assert found[f"attention_probs/{pair}"] == pytest.approx(float(want), rel=1e-5), PAIRS[pair]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scores_are_compared_where_both_models_attend(backend: str, padded: bool) -> None:
    student, teacher = models()
    batch = long_batch(padded=padded)
    own_s, own_t = own_attention(student, batch), own_attention(teacher, batch)
    everything = Wanted(attention=frozenset({1, 2, 3, 4}))
    with torch.no_grad():
        of_s, of_t = (capture(model, batch, everything) for model in (student, teacher))
    found = losses_of(student, teacher, batch, backend)
    for pair in PAIRS:
        m, g = int(pair[0]), int(pair[2])
        seen = (own_s[m - 1] > 0) & (own_t[g - 1] > 0)
        if batch.token_mask is not None:
            seen &= batch.token_mask[:, None, :, None]
        assert batch.counts.pairs(4 if 4 in (LAYERS[m - 1], LAYERS[g - 1]) else None) * 4 == int(seen.sum())
        scores = [f.scaling[n] * f.query[n] @ f.key[n].mT for f, n in ((of_s, m), (of_t, g))]
        assert found[f"attention/{pair}"] == pytest.approx(float((scores[0] - scores[1])[seen].square().mean()))
        assert found[f"attention_target/{pair}"] == pytest.approx(float(scores[1][seen].square().mean()))


def test_the_variance_of_scores_is_that_within_the_teachers_window() -> None:
    _, teacher = models()
    batch = long_batch(padded=True)

    def run(batch: Batch) -> Features:
        with torch.no_grad():
            return capture(teacher, batch, Wanted(attention=frozenset({2}), hidden=frozenset({2})))

    found = TeacherSlice([batch], run, torch.device("cpu"), shape_of(teacher.config, False))._scores[2].variance
    features = run(batch)
    scores = features.scaling[2] * features.query[2] @ features.key[2].mT
    assert batch.token_mask is not None
    seen = (own_attention(teacher, batch)[1] > 0) & batch.token_mask[:, None, :, None]
    by_head = [scores[:, head][seen[:, head]] for head in range(4)]
    want = float(torch.stack([x.double().var(correction=0) for x in by_head]).mean())
    assert found == pytest.approx(want, rel=1e-5)


def test_pairs_within_a_window_are_counted() -> None:
    lengths = np.array([1, 4, 9])
    for window in (0, 2, 8, 50):
        want = sum(abs(i - j) <= window for n in lengths for i in range(n) for j in range(n))
        assert Counts.from_lengths(lengths, windows=(window,)).pairs(window) == want
    counts = Counts.from_lengths(lengths, windows=(8, 2)) + Counts()
    doubled = (counts + counts).scaled(0.5)
    assert doubled == counts
    assert counts.with_values(counts.as_list()) == counts


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_losses_are_those_of_the_padded_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FULL_FROM, "cpu", 1.0)
    student, teacher = models()
    batch = long_batch(padded=True)
    assert runs_unpadded(student)
    assert segments_of(batch) is not None
    found = losses_of(student, teacher, batch, backend, unpadded=True)
    assert found == pytest.approx(losses_of(student, teacher, batch, backend), rel=1e-5)


def test_layers_that_attend_to_anything_else_are_refused() -> None:
    config = MistralConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=9,
        sliding_window=4,
    )
    with pytest.raises(UserError, match=r"'mistral'.* \(some attend to the left only"):
        shape_of(config, False)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_attention_that_is_more_than_a_softmax_of_scores_is_refused(name: str) -> None:
    recorder, tensors = Recorder(frozenset({1}), values=False), (torch.zeros(1, 1, 2, 4),) * 3
    with pytest.raises(UserError, match=rf"\({name}\).* set loss.attention, .* to 0"):
        recorder.record(torch.nn.Identity(), tensors, None, {name: 30.0})
