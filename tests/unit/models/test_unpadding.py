"""Encoders without the pads of their batches: the same features, losses and gradients as with them."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoders import batch_with_lengths, make_batch, tiny_model

from engine.config.distill import LOSS_NAMES, LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.jobs.distill.module import DistilModule
from engine.kernels import segments as segments_module
from engine.kernels.choice import Kernels
from engine.kernels.segments import Segments
from engine.losses.loss_set import LossSet
from engine.mapping import parse_mapping
from engine.models import capture as capture_module
from engine.models.capture import capture, inputs_of, segments_of
from engine.models.features import Features, Wanted
from engine.models.hub import shape_of
from engine.models.install import install, runs_unpadded
from engine.models.projections import Projections
from engine.models.student import enable_activation_checkpointing
from engine.models.unpadding import group_mask, packed_mask, packing, packing_of

FAMILIES = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert"]
EVERYTHING = Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({1, 4}), values=True)


GROUP_COSTS = 30


@pytest.fixture(autouse=True)
def cheap_groups(monkeypatch: pytest.MonkeyPatch):
    """So that short sequences have several."""
    monkeypatch.setattr(segments_module, "GROUP_COSTS", GROUP_COSTS)
    segments_module.segments_of_lengths.cache_clear()
    yield
    segments_module.segments_of_lengths.cache_clear()


@pytest.fixture(params=[False, True], ids=["", "pads kept"])
def pads_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the small batches of these tests keep a part of their pads, as larger ones do."""
    monkeypatch.setattr(capture_module, "MOST_ROUNDED_UP", 1 / 8 if request.param else 0.0)
    segments = segments_of(batch_with_lengths())
    assert segments is not None
    assert (segments.rows > segments.tokens) == request.param
    return bool(request.param)


def some_loss(features: Features, batch: Batch) -> torch.Tensor:
    """A sum over all captured entries of real tokens, each with its own factor."""
    segments = segments_of(batch)
    assert segments is not None
    total = torch.zeros(())
    for kind in ("hidden", "query", "key", "value"):
        for layer, tensor in getattr(features, kind).items():
            packed = tensor if features.segments is not None else segments.packed(tensor, tensor.dim() - 2)
            packed = packed.narrow(tensor.dim() - 2, 0, segments.tokens)
            factors = torch.sin(torch.arange(packed.numel(), dtype=packed.dtype)).view(packed.shape)
            total = total + (packed * factors).sum() * (1 + layer)
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("pads_kept")
def test_features_and_gradients_are_those_of_the_padded_batch(family: str, backend: str, checkpointing: bool) -> None:
    if family == "albert" and checkpointing:
        pytest.skip("transformers has no activation checkpointing for it")
    model = tiny_model(family)
    install(model, backend)
    assert runs_unpadded(model)
    if checkpointing:  # a layer that is run again in the backward pass must know where the sequences are
        enable_activation_checkpointing(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    model = model.double()
    batch = batch_with_lengths()
    found = []
    for unpadded in (False, True):
        model.zero_grad()
        features = capture(model, batch, EVERYTHING, unpadded=unpadded)
        assert (features.segments is not None) == unpadded
        loss = some_loss(features, batch)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (want, wanted_grads), (got, grads) = found
    assert torch.allclose(want, got, rtol=1e-10)
    assert wanted_grads.keys() == grads.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted_grads.values())
    for name, gradient in wanted_grads.items():
        assert float((gradient - grads[name]).abs().max()) <= 1e-9 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_get_their_pads_back(family: str, pads_kept: bool) -> None:
    model = tiny_model(family)
    install(model, "sdpa")
    batch = batch_with_lengths()
    assert batch.token_mask is not None
    with torch.no_grad():
        want = model.base_model(**inputs_of(batch)).last_hidden_state
        with packing(segments_of(batch), pad_at_end=True):
            got = model.base_model(**inputs_of(batch)).last_hidden_state
    assert got.shape == want.shape
    torch.testing.assert_close(got[batch.token_mask], want[batch.token_mask], atol=1e-5, rtol=1e-4)
    assert bool(got[~batch.token_mask].any()) == pads_kept
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("labels", [None, 0.4, 0.0])
@pytest.mark.usefixtures("pads_kept")
def test_logits_are_those_of_the_padded_batch(labels: float | None) -> None:
    model = tiny_model("bert", mlm=True)
    install(model, "sdpa")
    batch = batch_with_lengths(labels=labels)
    want = capture(model, batch, Wanted(logits=True)).logits
    got = capture(model, batch, Wanted(logits=True), unpadded=True).logits
    assert want is not None
    assert got is not None
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "teacher_unpadded"),
    [("reference", False), ("reference", True), ("torch", False), ("torch", True), ("triton", True)],
)
def test_every_loss_is_that_of_the_padded_batch(
    backend: str, teacher_unpadded: bool, pads_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one model runs with pads and the other without. Triton's kernels are for 16 bits, interpreted here."""
    dtype = torch.float64
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        dtype = torch.bfloat16
    teacher, student = (tiny_model("bert", mlm=True, seed=seed) for seed in (1, 0))
    for model in (teacher, student):
        install(model, "eager")
        model.to(dtype)
    shape = shape_of(student.config, True)
    mapping = parse_mapping("0-1-0-4", student_layers=4, teacher_layers=4, key="mapping")
    config = LossConfig(**dict.fromkeys(LOSS_NAMES, 1.0))
    losses = LossSet(
        config, MappingConfig(hidden="0-1-0-4"), hidden_map=mapping, attention_map=mapping, student=shape,
        teacher=shape, mlm_probability=0.15, kernels=Kernels(backend),
    )  # fmt: skip
    torch.manual_seed(2)
    projections = Projections(
        config, student_width=shape.width, teacher_width=shape.width, layers=losses.projected_layers
    ).to(dtype)
    batch = batch_with_lengths(labels=0.4)
    counts = Counts.from_lengths(np.array(batch.lengths), masked=int(batch.counts.masked))

    def run(unpadded: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            targets = capture(teacher, batch, losses.wanted_teacher, unpadded=unpadded and teacher_unpadded)
        module = DistilModule(copy.deepcopy(student), copy.deepcopy(projections), losses, unpadded=unpadded)
        total, logged = module(batch, targets, counts)
        total.backward()
        return total.detach(), logged, [p.grad for p in module.parameters() if p.grad is not None]

    (want_total, want_logged, want), (total, logged, gradients) = run(False), run(True)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(logged, want_logged, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(total, want_total, rtol=tolerance, atol=0.0)
    assert len(gradients) == len(want) > 30
    largest = max(float(a.norm()) for a in want)  # the gradient of a key's bias is 0 but for rounding
    for a, b in zip(want, gradients, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(a.norm()), 0.05 * largest)


def test_a_batch_that_is_nearly_full_keeps_its_pads() -> None:
    ids = torch.ones(2, 40, dtype=torch.long)
    mask = ids.clone()
    mask[1, 39:] = 0
    batch = make_batch()
    assert segments_of(replace(batch, input_ids=ids, attention_mask=mask, lengths=(40, 39))) is None
    assert segments_of(replace(batch, input_ids=ids, attention_mask=mask, lengths=None)) is None
    half = segments_of(replace(batch, input_ids=ids, attention_mask=mask, lengths=(40, 20)))
    assert half is not None
    assert half.lengths == (40, 20)
    assert segments_of(replace(batch, input_ids=ids, attention_mask=mask, lengths=(40, 35))) is None  # 75, so 76 rows


def test_batches_of_a_size_have_few_numbers_of_rows() -> None:
    """Each new one costs a CPU memory and time, so they are rounded up, by a sixteenth of the positions at most."""
    ids = torch.ones(16, 128, dtype=torch.long)
    batch, generator, found = make_batch(), random.Random(0), set()
    for _ in range(300):
        lengths = (128, *(generator.randint(60, 128) for _ in range(15)))
        segments = segments_of(replace(batch, input_ids=ids, attention_mask=ids, lengths=lengths))
        if segments is not None:
            assert 0 <= segments.rows - sum(lengths) < 128
            found.add(segments.rows)
    assert 2 < len(found) <= 16


def test_padded_and_packed_are_inverse_of_each_other() -> None:
    segments = Segments([5, 2, 7, 7])
    x = torch.randn(1, 3, 21, 4)
    padded = segments.padded(x, 2)
    assert padded.shape == (4, 3, 7, 4)
    assert not padded[1, :, 2:].any()
    assert torch.equal(segments.packed(padded, 2), x)
    wider = torch.cat([padded, torch.full((4, 3, 2, 4), torch.nan)], dim=2)
    assert torch.equal(segments.packed(wider, 2), x)
    kept = Segments([5, 2, 7, 7], rows=24)
    with_pads = torch.cat([x, torch.randn(1, 3, 3, 4)], dim=2)
    real = kept.mask_on(x.device)
    assert real is not None
    assert torch.equal(kept.padded(with_pads, 2).transpose(1, 2)[real], padded.transpose(1, 2)[real])
    assert torch.equal(kept.packed(kept.padded(with_pads, 2), 2), with_pads)
    real_rows = kept.real_rows_on(x.device)
    assert real_rows is not None
    assert real_rows.tolist() == [[True] * 21 + [False] * 3]
    even = Segments([3, 3])
    assert torch.equal(even.packed(even.padded(x[:, :, :6], 2), 2), x[:, :, :6])


def test_sequences_are_grouped_at_the_least_cost() -> None:
    lengths = [3, 12, 5, 11, 4, 2, 20]
    ordered = sorted(lengths)

    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * max(group) ** 2 + GROUP_COSTS for group in groups)

    cuts = range(2 ** (len(ordered) - 1))
    every = [[list(g) for g in split_at(ordered, [i + 1 for i in range(6) if cut >> i & 1])] for cut in cuts]
    best = min(map(cost, every))
    found = [[lengths[i] for i in group] for group in Segments(lengths)._groups]
    assert sorted(length for group in found for length in group) == ordered
    assert cost(found) == best
    assert 1 < len(found) < len(lengths)


def split_at(values: list[int], cuts: list[int]) -> list[list[int]]:
    return [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]


@pytest.mark.parametrize("kept", [0, 4])
def test_groups_hold_every_token_once(kept: int) -> None:
    segments = Segments([5, 2, 7, 30, 6, 2, 28], rows=80 + kept)
    groups, back = segments.groups_on(torch.device("cpu"))
    assert len(groups) > 1
    assert back is not None
    tokens = torch.cat([at for _, at in groups if at is not None])
    assert sorted(tokens.tolist()) == list(range(80))
    assert len(back) == 80 + kept
    assert torch.equal(tokens[back[:80]], torch.arange(80))
    assert [sorted(group.lengths) for group, _ in groups] == [[2, 2], [5, 6, 7], [28], [30]]


def test_segments_go_with_their_last_user() -> None:
    """Without waiting for the collector: each batch has tensors of them on the device."""
    segments = Segments([3, 5, 2])
    for device in (torch.device("cpu"),):
        segments.mask_on(device)
        segments.groups_on(device)
    gone = weakref.ref(segments)
    gc.disable()
    try:
        del segments
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("lengths", [(9, 2, 5), (9, 9)])
def test_tokens_attend_within_their_window_and_every_pad_to_something(lengths: tuple[int, ...]) -> None:
    found = group_mask(Segments(lengths), 1, torch.device("cpu"))
    assert found is not None
    assert found.shape == (len(lengths), 1, 9, 9)
    assert bool(found.any(-1).all()), "a softmax over nothing is NaN, and so is its gradient"
    for mask, length in zip(found[:, 0], lengths, strict=True):
        near = torch.arange(9)[None, :].sub(torch.arange(length)[:, None]).abs() <= 1
        assert torch.equal(mask[:length], near & (torch.arange(9) < length))
    assert group_mask(Segments((9, 9)), 8, torch.device("cpu")) is None, "all tokens are near"


def test_no_other_tensor_is_taken_for_a_packed_mask() -> None:
    for other in (None, torch.ones(4), torch.tensor([0, 3, 5]), torch.tensor([], dtype=torch.int64), torch.ones(2, 3)):
        assert packing_of(other) is None
    with packing(Segments([3, 5], rows=9), pad_at_end=True):
        found = [packing_of(packed_mask(window).detach().clone()) for window in (None, 0)]  # type: ignore[union-attr]
    for packed, window in zip(found, (None, 0), strict=True):
        assert packed is not None
        assert (packed.segments.lengths, packed.segments.rows) == ((3, 5), 9)
        assert (packed.pad_at_end, packed.window) == (True, window)
