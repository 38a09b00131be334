"""engine/losses: the registry, the terms and their coefficients, every refusal, and the numbers of the whole set."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT
from torch import nn

from engine.config.distill import LOSS_NAMES, LossConfig, MappingConfig
from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels import reference
from engine.kernels.inputs import UNSCORED_LABEL, Attention, Rows
from engine.losses.base import Target
from engine.losses.loss_set import LossSet
from engine.losses.random_layers import RandomLosses
from engine.losses.registry import LOSSES
from engine.mapping import RandomEachStep, parse_mapping
from engine.models.features import Features, Wanted
from engine.models.mlm_head import MlmHead
from engine.models.projections import Projections
from engine.models.shape import ModelShape

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference / largest wanted magnitude."""

STUDENT = ModelShape(layers=4, width=12, heads=4, vocab=31, has_mlm_head=True)
TEACHER = ModelShape(layers=12, width=20, heads=4, vocab=31, has_mlm_head=True)
RANDOM = RandomEachStep.from_sizes(student_layers=4, teacher_layers=12, key="mapping.hidden")
OFF = dict.fromkeys(LOSS_NAMES, 0.0)
EVERYTHING = {
    "hidden": 1.0, "attention": 0.5, "embedding": 2.0, "attention_probs": 0.7, "relation": 1.5, "cosine": 0.3,
    "pooled": 0.6, "pooled_weights": [1.0, 0.5, 0.0], "logits": 0.9, "mlm": 1.1,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are small: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_set(
    loss: dict[str, object] | None = None,
    *,
    hidden: str = "uniform",
    attention: str | None = None,
    student: ModelShape = STUDENT,
    teacher: ModelShape = TEACHER,
    mlm_probability: float = 0.0,
    **mapping: object,
) -> LossSet:
    sizes = {"student_layers": student.layers, "teacher_layers": teacher.layers}
    return LossSet(
        LossConfig(**(loss or {})),
        MappingConfig(hidden=hidden, attention=attention, **mapping),
        hidden_map=parse_mapping(hidden, **sizes),
        attention_map=parse_mapping(attention or hidden, **sizes),
        student=student,
        teacher=teacher,
        mlm_probability=mlm_probability,
    )


def make_random_set(loss: dict[str, object] | None = None, *, seed: int = 0, **mapping: object) -> RandomLosses:
    return RandomLosses(
        LossConfig(**(loss or {})),
        MappingConfig(hidden="random-each-step", **mapping),
        layers=RANDOM,
        seed=seed,
        student=STUDENT,
        teacher=TEACHER,
        mlm_probability=0.15,
    )


class TinyEncoder(nn.Module):
    """A real encoder: embeddings, then layers of masked attention with a residual; `capture` returns what is wanted."""

    def __init__(self, shape: ModelShape, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.embeddings = nn.Embedding(shape.vocab, shape.width)
        self.qkv = nn.ModuleList(nn.Linear(shape.width, 3 * shape.width) for _ in range(shape.layers))
        self.mix = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.vocab)
        self.to(dtype)

    def capture(self, batch: Batch, wanted: Wanted) -> Features:
        B, L = batch.input_ids.shape
        head_width = self.shape.width // self.shape.heads
        mask = batch.token_mask
        features = Features()
        hidden = self.embeddings(batch.input_ids)
        states = {0: hidden}
        for layer, (qkv, mix) in enumerate(zip(self.qkv, self.mix, strict=True), start=1):
            q, k, v = qkv(hidden).view(B, L, 3, self.shape.heads, head_width).permute(2, 0, 3, 1, 4)
            keys = None if mask is None else mask[:, None, None, :]
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
            hidden = hidden + torch.tanh(mix(mixed.transpose(1, 2).reshape(B, L, -1)))
            states[layer] = hidden
            if layer in wanted.attention:
                features.query[layer], features.key[layer] = q, k
                features.scaling[layer] = head_width**-0.5
                if wanted.values:
                    features.value[layer] = v
        features.hidden = {layer: states[layer] for layer in wanted.hidden}
        if wanted.logits:
            chosen = batch.labels != UNSCORED_LABEL if batch.labels is not None else mask
            features.mlm_head = MlmHead(hidden.flatten(0, 1) if chosen is None else hidden[chosen], self.head)
        return features


def make_batch(lengths: list[int], padded_to: int, *, masking: bool, pad_id: int = 0, first_sequence: int = 0) -> Batch:
    """Sequences whose content depends on their index only. Sequence 0 has no label, the others one in four tokens."""
    B = len(lengths)
    ids = torch.full((B, padded_to), pad_id)
    labels = torch.full((B, padded_to), UNSCORED_LABEL)
    mask = torch.zeros(B, padded_to, dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(first_sequence + row)
        ids[row, :length] = torch.randint(1, STUDENT.vocab, (length,), generator=generator)
        mask[row, :length] = 1
        if first_sequence + row > 0:
            labels[row, 1:length:4] = torch.randint(1, STUDENT.vocab, (len(range(1, length, 4)),), generator=generator)
    counts = Counts(
        sequences=B,
        tokens=sum(lengths),
        token_pairs=sum(n * n for n in lengths),
        positions=B * padded_to,
        position_pairs=B * padded_to**2,
        masked=int((labels != UNSCORED_LABEL).sum()) if masking else 0,
    )
    return Batch(ids, mask if min(lengths) < padded_to else None, labels if masking else None, counts)


def make_projections(loss_set: LossSet, config: LossConfig, dtype: torch.dtype = torch.float64) -> Projections:
    torch.manual_seed(9)
    projections = Projections(
        config, student_width=STUDENT.width, teacher_width=TEACHER.width, layers=loss_set.projected_layers
    )
    with torch.no_grad():
        for name, parameter in projections.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return projections.to(dtype)


def forward(loss_set, student, teacher, batch, per_micro, projections):
    with torch.no_grad():
        targets = teacher.capture(batch, loss_set.wanted_teacher)
    return loss_set(student.capture(batch, loss_set.wanted_student), targets, batch, per_micro, projections)


def global_gradient(config: LossConfig, micro_batches: list[Batch], **options) -> tuple[list[torch.Tensor], ...]:
    """(total, terms) and gradients as DeepSpeed forms them: the mean over the micro batches."""
    loss_set = make_set({f.name: getattr(config, f.name) for f in fields(config)}, **options)
    student, teacher = TinyEncoder(STUDENT, 1), TinyEncoder(TEACHER, 2)
    projections = make_projections(loss_set, config)
    counts = sum((batch.counts for batch in micro_batches), Counts())
    totals = []
    for batch in micro_batches:
        per_micro = counts.scaled(1 / len(micro_batches))
        total, terms = forward(loss_set, student, teacher, batch, per_micro, projections)
        (total / len(micro_batches)).backward()
        totals.append(torch.cat([total.detach()[None], terms]))
    parameters = dict([*student.named_parameters(), *projections.named_parameters()])
    return [torch.stack(totals).mean(0)], [p.grad for p in parameters.values() if p.grad is not None]


def assert_close(what: str, want: torch.Tensor, got: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
    worst, largest = (want.double() - got.double()).abs().max().item(), want.abs().max().item()
    assert worst <= TOLERANCE[dtype] * largest, f"{what}: differs by {worst:.3g} where the largest is {largest:.3g}"


def test_registry_has_every_loss_in_order():
    assert tuple(LOSSES) == LOSS_NAMES


def test_default_terms_coefficients_and_captures():
    losses = make_set({"hidden": 2.0}, hidden="0-5-0-10")
    assert losses.term_names == ("hidden/2-5", "hidden/4-10", "attention/2-5", "attention/4-10", "embedding")
    assert losses.coefficients == (1.0, 1.0, 0.5, 0.5, 1.0)
    assert losses.wanted_student == Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({2, 4}))
    assert losses.wanted_teacher == Wanted(hidden=frozenset({0, 5, 10}), attention=frozenset({5, 10}))
    assert losses.projected_layers == {0, 2, 4}
    assert losses.warnings == ()


def test_two_maps_with_weights_and_relations():
    loss = {**OFF, "cosine": 2.0, "relation": 3.0, "relation_weights": [1.0, 0.0, 0.5], "relation_heads": 2}
    losses = make_set(
        loss, hidden="3-6-9-12", attention="0-0-11-12", hidden_weights=[1, 0, 2, 1], attention_weights=[1, 1, 4, 1]
    )
    assert dict(zip(losses.term_names, losses.coefficients, strict=True)) == pytest.approx(
        {
            "relation/qq/3-11": 3 * 4 / 2,
            "relation/qq/4-12": 3 / 2,
            "relation/vv/3-11": 3 * 0.5 * 4 / 2,
            "relation/vv/4-12": 3 * 0.5 / 2,
            "cosine/1-3": 2 / 3,
            "cosine/3-9": 2 * 2 / 3,
            "cosine/4-12": 2 / 3,
        }
    )
    assert losses.term_names[0] == "relation/qq/3-11", "the order of LOSS_NAMES"
    assert losses.wanted_teacher == Wanted(hidden=frozenset({3, 9, 12}), attention=frozenset({11, 12}), values=True), (
        "no state of layer 6: its weight is 0"
    )
    assert losses.projected_layers == {1, 3, 4}


def test_values_are_captured_only_for_the_value_relation():
    losses = make_set({**OFF, "relation": 1.0, "relation_weights": [1.0, 1.0, 0.0]})
    assert not losses.wanted_student.values
    assert not losses.projected_layers


@pytest.mark.parametrize(
    ("loss", "coefficient"),
    [({}, 1 / 3), ({"average_layers": False}, 1.0), ({"preset": "tinybert"}, 1.0), ({"average_layers": True}, 1 / 3)],
)
def test_average_over_active_layers_is_a_switch(loss, coefficient):
    losses = make_set(loss, hidden="3-6-0-12")
    assert losses.coefficients == pytest.approx((coefficient,) * 6 + (1.0,))


def test_logits_are_wanted_from_the_teacher_only_for_the_kl():
    mlm = make_set({**OFF, "mlm": 1.0}, mlm_probability=0.15)
    assert mlm.wanted_student == Wanted(logits=True)
    assert mlm.wanted_teacher == Wanted()
    kl = make_set({**OFF, "logits": 1.0})
    assert kl.wanted_teacher == kl.wanted_student == Wanted(logits=True)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (OFF, {}, "nothing to learn from: every loss weight is 0"),
        (
            {**OFF, "hidden": 1.0, "attention": 1.0},
            {"hidden": "none"},
            r"nothing to learn from: loss\.hidden=1 .*0-0-0-0.*loss\.attention=1 .*loss\.embedding=1",
        ),
        ({**OFF, "hidden": 1.0}, {"hidden_weights": [0, 0, 0, 0]}, "nothing to learn from"),
        (
            {},
            {"teacher": replace(TEACHER, heads=5)},
            r"loss\.attention=1 .*student has 4 heads and the teacher 5: set student\.heads=5.*loss\.relation",
        ),
        (
            {**OFF, "attention_probs": 0.5},
            {"teacher": replace(TEACHER, heads=5)},
            r"loss\.attention_probs=0\.5 .*4 heads and the teacher 5: set student\.heads=5.*loss\.relation",
        ),
        (
            {**OFF, "relation": 1.0, "relation_heads": 5},
            {},
            r"loss\.relation_heads=5 must divide .*student's 12 and the teacher's 20: choose one of 1, 2, 4",
        ),
        (
            {**OFF, "relation": 1.0},
            {"teacher": replace(TEACHER, heads=10)},
            r"loss\.relation_heads=10 \(unset: the teacher's number of heads\) must divide",
        ),
        (
            {"projection": "identity"},
            {},
            r"loss\.projection='identity'.*student has 12 and the teacher 20: set student\.hidden_size=20",
        ),
        (
            {"logits": 1.0},
            {"teacher": replace(TEACHER, has_mlm_head=False)},
            r"loss\.logits=1 needs an MLM head .*on the teacher:.*loss\.logits=0",
        ),
        (
            {"logits": 1.0},
            {"teacher": replace(TEACHER, has_mlm_head=False), "student": replace(STUDENT, has_mlm_head=False)},
            "on the student and the teacher",
        ),
        ({"logits": 1.0}, {"teacher": replace(TEACHER, vocab=32)}, r"loss\.logits=1 .*31 tokens and the teacher 32"),
        ({"mlm": 1.0}, {}, r"loss\.mlm=1 .*data\.mlm_probability=0: set data\.mlm_probability=0\.15"),
        (
            {"mlm": 1.0},
            {"mlm_probability": 0.15, "student": replace(STUDENT, has_mlm_head=False)},
            r"loss\.mlm=1 needs an MLM head.*student",
        ),
        ({}, {"hidden_weights": [1, 1, 1]}, r"mapping\.hidden_weights=\[1, 1, 1\] has 3 weights.*4 layers"),
        ({}, {"attention_weights": [1] * 5}, r"mapping\.attention_weights=.* has 5 weights.*4 layers"),
    ],
)
def test_what_cannot_work_is_refused(loss, options, message):
    with pytest.raises(UserError, match=message):
        make_set(loss, **options)


def test_limits_of_an_idle_loss_do_not_matter():
    """No pair of layers: nothing is compared, so different head counts and widths are harmless."""
    losses = make_set(
        {**OFF, "attention": 1.0, "logits": 1.0, "projection": "identity"},
        hidden="none",
        teacher=replace(TEACHER, heads=5),
    )
    assert losses.term_names == ("logits",)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ({}, {"hidden": "none"}, r"loss\.hidden=1 has no effect: the hidden mapping 0-0-0-0 has no pair"),
        ({"relation": 1}, {"attention": "none"}, r"loss\.relation=1 has no effect: the attention mapping 0-0-0-0"),
        ({"temperature": 2.0}, {}, r"loss\.temperature=2\.0 has no effect: loss\.logits is not active"),
        ({"relation_heads": 4}, {}, r"loss\.relation_heads=4 has no effect: loss\.relation"),
        ({"relation_weights": [1, 0, 0]}, {}, r"loss\.relation_weights=\[1, 0, 0\] has no effect"),
        ({**OFF, "attention": 1, "projection": "single"}, {}, r"loss\.projection='single' has no effect"),
        ({**OFF, "attention": 1, "projection_bias": True}, {}, r"loss\.projection_bias=True has no effect"),
        (
            {"projection": "identity", "projection_bias": True},
            {"teacher": replace(TEACHER, width=12)},
            r"loss\.projection_bias=True has no effect: loss\.projection='identity'",
        ),
        ({**OFF, "embedding": 1, "average_layers": True}, {}, r"loss\.average_layers=True has no effect"),
        ({**OFF, "embedding": 1}, {"hidden_weights": [1, 1, 1, 1]}, r"mapping\.hidden_weights=.* has no effect"),
        ({"attention": 0}, {"attention_weights": [1] * 4}, r"mapping\.attention_weights=.* has no effect"),
        ({"attention": 0}, {"attention": "last"}, r"mapping\.attention='last' has no effect: loss\.attention or"),
        ({"hidden": 0}, {"hidden": "last", "attention": "first"}, r"mapping\.hidden='last' has no effect"),
    ],
)
def test_settings_without_effect_are_named(loss, options, message):
    warnings = make_set(loss, **options).warnings
    assert any(re.search(message, warning) for warning in warnings), warnings


def test_the_attention_losses_use_the_hidden_map_when_they_have_none_of_their_own():
    assert make_set({"hidden": 0, "embedding": 0}, hidden="last").warnings == ()


def test_random_terms_are_named_by_student_layer_and_the_teacher_captures_all():
    losses = make_random_set({"hidden": 2.0, "relation": 3.0}, hidden_weights=[1, 0, 2, 1])
    assert losses.term_names == (
        "hidden/1-random", "hidden/3-random", "hidden/4-random",
        *(f"attention/{m}-random" for m in (1, 2, 3, 4)),
        "embedding",
        *(f"relation/{kind}/{m}-random" for kind in ("qq", "kk", "vv") for m in (1, 2, 3, 4)),
    )  # fmt: skip
    assert losses.observed_names == tuple(f"attention_target/{m}-random" for m in (1, 2, 3, 4))
    assert losses.coefficients[:3] == pytest.approx((2 / 3, 4 / 3, 2 / 3))
    layers = frozenset(range(1, 13))
    assert losses.wanted_teacher == Wanted(hidden=layers | {0}, attention=layers, values=True)
    assert losses.wanted_student == Wanted(
        hidden=frozenset({0, 1, 3, 4}), attention=frozenset({1, 2, 3, 4}), values=True
    )
    assert losses.held_out_names[:3] == ("hidden/1-3", "hidden/3-9", "hidden/4-12"), "of the uniform mapping"
    assert losses.projected_layers == {0, 1, 3, 4}
    assert losses.targets["hidden/3-10"] == Target("hidden", 10)
    assert "hidden/3-2" not in losses.targets, "the third of four sorted layers is at least layer 3"
    assert losses.warnings == ()
    with pytest.raises(UserError, match=r"mapping\.hidden_weights=\[1\] has 1 weights"):
        make_random_set(hidden_weights=[1])


@pytest.mark.parametrize("loss", [EVERYTHING, {**OFF, "hidden": 1.0, "preset": "tinybert"}], ids=["all", "tinybert"])
@pytest.mark.parametrize("step", [None, 0, 1, 70_000])
def test_random_losses_of_a_step_are_those_of_its_mapping_bit_for_bit(loss, step):
    """Also divided by scales: each term by that of the layer that was drawn."""
    losses = make_random_set(loss, seed=5)
    drawn = RANDOM if step is None else RANDOM.drawn(5, step)
    fixed = make_set(loss, hidden="-".join(map(str, drawn.genes)), mlm_probability=0.15)
    scales = {} if "preset" in loss else {term: 0.5 + 0.01 * i for i, term in enumerate(losses.targets)}
    batch = replace(make_batch([5, 9, 3], 9, masking=True), step=step)
    student = TinyEncoder(STUDENT, 1).capture(batch, losses.wanted_student)
    with torch.no_grad():
        teacher = TinyEncoder(TEACHER, 2).capture(batch, losses.wanted_teacher)
    inputs = student, teacher, batch, batch.counts, make_projections(losses, losses.config)
    total, terms = losses.scaled(scales)(*inputs)
    want_total, want_terms = fixed.scaled(scales)(*inputs)
    assert len(terms) == len(losses.term_names) + len(losses.observed_names)
    assert torch.equal(total, want_total)
    assert torch.equal(terms, want_terms)
    if scales:
        at = losses.term_names.index("hidden/3-random")
        assert torch.equal(terms[at], fixed(*inputs)[1][at] / scales[f"hidden/3-{drawn.genes[2]}"])


def one_step(loss: dict[str, object], *, masking: bool = True):
    config = LossConfig(**loss)
    losses = make_set(loss, hidden="3-0-9-12", mlm_probability=0.15 if masking else 0.0)
    batch = make_batch([5, 9, 3], 9, masking=masking)
    student = TinyEncoder(STUDENT, 1).capture(batch, losses.wanted_student)
    with torch.no_grad():
        teacher = TinyEncoder(TEACHER, 2).capture(batch, losses.wanted_teacher)
    return losses, student, teacher, batch, make_projections(losses, config)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("loss", "kind", "pair"),
    [
        ("hidden", "hidden", (3, 9)),
        ("cosine", "hidden", (4, 12)),
        ("embedding", "hidden", (0, 0)),
        ("attention", "query", (1, 3)),
        ("attention", "scaling", (1, 3)),
        ("attention_probs", "key", (3, 9)),
        ("relation", "value", (4, 12)),
        ("pooled", "hidden", (4, 12)),
    ],
)
def test_a_missing_capture_is_an_error_that_names_it(loss, kind, pair, side):
    losses, student, teacher, batch, projections = one_step({**OFF, loss: 1.0})
    layer = pair[side == "teacher"]
    del getattr({"student": student, "teacher": teacher}[side], kind)[layer]
    with pytest.raises(RuntimeError, match=rf"loss\.{loss} needs the {side}'s {kind} of layer {layer}\b"):
        losses(student, teacher, batch, batch.counts, projections)


@pytest.mark.parametrize(("loss", "side"), [("logits", "student"), ("logits", "teacher"), ("mlm", "student")])
def test_missing_or_misplaced_logits_are_an_error(loss, side):
    losses, student, teacher, batch, projections = one_step({**OFF, loss: 1.0})
    features = {"student": student, "teacher": teacher}[side]
    features.mlm_head = MlmHead(features.mlm_head.hidden[1:], features.mlm_head.decoder)
    with pytest.raises(RuntimeError, match=rf"loss\.{loss}: the {side} has logits at 2 positions, .* has 3"):
        losses(student, teacher, batch, batch.counts, projections)
    features.mlm_head = None
    with pytest.raises(RuntimeError, match=rf"loss\.{loss} needs the {side}'s logits"):
        losses(student, teacher, batch, batch.counts, projections)


def test_mlm_without_labels_and_a_trainable_teacher_are_errors():
    losses, student, teacher, batch, projections = one_step({**OFF, "mlm": 1.0})
    with pytest.raises(RuntimeError, match=r"loss\.mlm needs the batch's labels"):
        losses(student, teacher, replace(batch, labels=None), batch.counts, projections)
    losses, student, teacher, batch, projections = one_step({**OFF, "hidden": 1.0})
    teacher.hidden[9].requires_grad_()
    with pytest.raises(RuntimeError, match="teacher's hidden of layer 9 has a gradient"):
        losses(student, teacher, batch, batch.counts, projections)


def test_total_is_the_weighted_sum_and_terms_are_raw():
    losses, student, teacher, batch, projections = one_step(EVERYTHING)
    total, terms = losses(student, teacher, batch, batch.counts, projections)
    assert total.requires_grad
    assert total.shape == ()
    assert not terms.requires_grad
    assert terms.shape == (len(losses.term_names) + len(losses.observed_names),)
    terms = terms[: len(losses.term_names)]
    assert_close("total", (terms * torch.tensor(losses.coefficients, dtype=terms.dtype)).sum(), total.detach())
    doubled = make_set(
        {**EVERYTHING, **{name: 2 * EVERYTHING[name] for name in LOSS_NAMES}}, hidden="3-0-9-12", mlm_probability=0.15
    )
    total2, terms2 = doubled(student, teacher, batch, batch.counts, projections)
    assert torch.equal(terms, terms2[: len(terms)])
    assert_close("doubled", 2 * total.detach(), total2.detach())


def test_terms_are_those_of_the_reference():
    losses, student, teacher, batch, projections = one_step({**EVERYTHING, "temperature": 2.0, "relation_heads": 2})
    _, terms = losses(student, teacher, batch, batch.counts, projections)
    got = dict(zip((*losses.term_names, *losses.observed_names), terms, strict=True))
    mask, counts = batch.token_mask, batch.counts
    tensors = student.query[3], student.key[3], teacher.query[9], teacher.key[9]
    attention = Attention(*tensors, scale_s=3**-0.5, scale_t=5**-0.5, rows=Rows(mask))
    projected = projections(3, student.hidden[3]), teacher.hidden[9], mask, counts.tokens
    masked_labels = batch.labels[batch.labels != UNSCORED_LABEL]
    relation = {"relation_heads": 2, "mask": mask, "tokens": counts.tokens}
    means = [
        torch.stack([states[row, :length].mean(0) for row, length in enumerate([5, 9, 3])])
        for states in (student.hidden[4], teacher.hidden[12])
    ]
    vectors = projections(4, means[0]), means[1]
    want = {
        "hidden/3-9": reference.hidden_mse(*projected),
        "cosine/3-9": reference.hidden_cosine(*projected),
        "attention/3-9": reference.attention_score_mse(attention, token_pairs=counts.token_pairs),
        "attention_probs/3-9": reference.attention_probs_kl(attention, tokens=counts.tokens),
        "embedding": reference.hidden_mse(projections(0, student.hidden[0]), teacher.hidden[0], mask, counts.tokens),
        "relation/qq/3-9": reference.relation_kl(student.query[3], teacher.query[9], **relation),
        "relation/kk/3-9": reference.relation_kl(student.key[3], teacher.key[9], **relation),
        "relation/vv/3-9": reference.relation_kl(student.value[3], teacher.value[9], **relation),
        "pooled/cosine": (1 - torch.cosine_similarity(*vectors)).mean(),
        "pooled/mse": (vectors[0] - vectors[1]).square().mean(),
        "logits": reference.logits_kl(student.logits, teacher.logits, temperature=2.0, count=counts.masked),
        "mlm": reference.mlm_cross_entropy(student.logits, masked_labels, count=counts.masked),
    }
    assert {name.split("/")[0] for name in want} == set(LOSS_NAMES)
    nothing = torch.zeros_like(tensors[0][..., :1])
    want["attention_target/3-9"] = reference.attention_score_mse(
        attention._replace(q_s=nothing, k_s=nothing), token_pairs=counts.token_pairs
    )
    for name, value in want.items():
        assert_close(name, value.detach(), got[name])


def test_similarity_of_texts_by_hand():
    """KL of the softmax of the cosines to the other texts, text by text."""
    losses, student, teacher, batch, projections = one_step(
        {**OFF, "pooled": 1.0, "pooled_weights": [0.0, 0.0, 1.0], "pooled_temperature": 0.5}, masking=False
    )
    total, _ = losses(student, teacher, batch, batch.counts, projections)

    def cosines(states: torch.Tensor) -> torch.Tensor:
        unit = [nn.functional.normalize(row[:n].mean(0), dim=0) for row, n in zip(states, [5, 9, 3], strict=True)]
        return torch.stack([torch.stack([a @ b / 0.5 for b in unit if b is not a]).softmax(0) for a in unit])

    ours, theirs = cosines(projections(4, student.hidden[4])), cosines(teacher.hidden[12])
    assert_close("similarity", (theirs * (theirs / ours).log()).sum(1).mean().detach(), total.detach())
    total.backward()
    assert all(bool(parameter.grad.any()) for parameter in projections.parameters())


def test_the_pooled_loss_looks_at_the_last_states_alone():
    losses = make_set({**OFF, "pooled": 2.0, "pooled_weights": [1.0, 0.0, 0.5]}, hidden="none")
    assert dict(zip(losses.term_names, losses.coefficients, strict=True)) == {
        "pooled/cosine": 2.0,
        "pooled/similarity": 1.0,
    }
    assert losses.wanted_student == Wanted(hidden=frozenset({4}))
    assert losses.wanted_teacher == Wanted(hidden=frozenset({12}))
    assert losses.state_pairs == {"pooled": (4, 12)}
    assert losses.warnings == ()


def test_logits_without_masking_compare_all_real_positions():
    losses, student, teacher, batch, projections = one_step({**OFF, "logits": 1.0}, masking=False)
    total, _ = losses(student, teacher, batch, batch.counts, projections)
    assert student.logits.shape == (5 + 9 + 3, STUDENT.vocab)
    want = reference.logits_kl(student.logits, teacher.logits, temperature=1.0, count=17)
    assert_close("logits", want.detach(), total.detach())


def test_grouped_keys_and_values_in_every_attention_loss():
    """Two key heads serve four query heads: the same as each key head written out twice."""
    loss = {**OFF, "attention": 1.0, "attention_probs": 1.0, "relation": 1.0}
    losses, student, teacher, batch, projections = one_step(loss)
    for kind in ("key", "value"):
        for features in (student, teacher):
            tensors = getattr(features, kind)
            tensors.update({layer: x[:, :2].detach() for layer, x in tensors.items()})
    got, _ = losses(student, teacher, batch, batch.counts, projections)
    for kind in ("key", "value"):
        for features in (student, teacher):
            tensors = getattr(features, kind)
            tensors.update({layer: x[:, [0, 0, 1, 1]] for layer, x in tensors.items()})
    want, _ = losses(student, teacher, batch, batch.counts, projections)
    assert_close("total", want.detach(), got.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_features_give_float32_losses(dtype):
    losses, student, teacher, batch, projections = one_step(EVERYTHING)
    for features in (student, teacher):
        for kind in ("hidden", "query", "key", "value"):
            getattr(features, kind).update({k: x.to(dtype) for k, x in getattr(features, kind).items()})
        features.mlm_head = MlmHead(features.mlm_head.hidden.to(dtype), features.mlm_head.decoder.to(dtype))
    total, terms = losses(student, teacher, batch, batch.counts, projections.to(dtype))
    assert total.dtype == terms.dtype == torch.float32
    assert torch.isfinite(terms).all()


@pytest.mark.parametrize("loss", [EVERYTHING, {**OFF, "cosine": 1.0, "preset": "tinybert"}], ids=["all", "cosine"])
def test_poisoned_padding_changes_neither_total_nor_gradient(loss):
    """Also not the gradient of the projections, which is a sum over all tokens."""
    masking = "mlm" in loss and bool(loss["mlm"])
    losses, student, teacher, batch, projections = one_step(loss, masking=masking)

    def run(poison: float) -> list[torch.Tensor]:
        pad, leaves, sides = ~batch.token_mask, [], []
        for features, trained in ((student, True), (teacher, False)):
            copy = Features(scaling=features.scaling)
            for kind in ("hidden", "query", "key", "value"):
                for layer, x in getattr(features, kind).items():
                    where = pad[:, :, None] if x.dim() == 3 else pad[:, None, :, None]
                    getattr(copy, kind)[layer] = x.detach().masked_fill(where, poison).requires_grad_(trained)
                leaves += getattr(copy, kind).values() if trained else ()
            if features.mlm_head is not None:
                head = features.mlm_head
                copy.mlm_head = MlmHead(head.hidden.detach().requires_grad_(trained), head.decoder)
            sides.append(copy)
        projections.zero_grad()
        total, terms = losses(*sides, batch, batch.counts, projections)
        total.backward()
        return [terms, *(x.grad for x in leaves if x.grad is not None), *(p.grad for p in projections.parameters())]

    for want, got in zip(run(0.0), run(float("nan")), strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(want, got)


LENGTHS = [5, 9, 3, 7, 9, 2, 6, 8]
DIVISIONS = {"1x8": 8, "2x4": 4, "8x1": 1}
"""accumulation x micro batch -> micro batch"""


def split(micro: int, *, padded_to: int | None, masking: bool) -> list[Batch]:
    """padded_to None: each micro batch is padded to its own longest sequence, as a loader that trims would."""
    return [
        make_batch(
            LENGTHS[i : i + micro],
            padded_to or max(LENGTHS[i : i + micro]),
            masking=masking,
            first_sequence=i,
        )
        for i in range(0, len(LENGTHS), micro)
    ]


@pytest.mark.parametrize("masking", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("projection", ["shared", "per_layer", "single"])
def test_gradient_depends_neither_on_the_split_nor_on_padding(projection, masking):
    loss = {**EVERYTHING, "mlm": 1.1 * masking, "projection": projection, "projection_bias": True}
    config = LossConfig(**loss)
    options = {
        "hidden": "3-0-9-12",
        "attention": "1-2-0-11",
        "hidden_weights": [1, 1, 2, 0.5],
        "mlm_probability": 0.15 if masking else 0.0,
    }
    want_values, want = global_gradient(config, split(8, padded_to=9, masking=masking), **options)
    for name, micro in DIVISIONS.items():
        for padded_to in (None, 9, 14):
            batches = split(micro, padded_to=padded_to, masking=masking)
            values, got = global_gradient(config, batches, **options)
            assert_close(f"values of {name}", want_values[0], values[0])
            for a, b in zip(want, got, strict=True):
                assert_close(f"gradient of {name} padded to {padded_to}", a, b)
    assert masking is False or split(1, padded_to=9, masking=True)[0].counts.masked == 0, "a micro batch without labels"


def test_every_projection_parameter_gets_a_gradient():
    for projection in ("shared", "per_layer", "single"):
        loss = {"projection": projection, "projection_bias": True, "cosine": 1.0}
        losses, student, teacher, batch, projections = one_step(loss, masking=False)
        losses(student, teacher, batch, batch.counts, projections)[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in projections.parameters())


@given(
    genes=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4),
    average=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_coefficients_of_any_mapping(genes, weights, average):
    losses = make_set(
        {"average_layers": average}, hidden="-".join(map(str, genes)), hidden_weights=weights, attention="uniform"
    )
    active = [(m, g, w) for m, (g, w) in enumerate(zip(genes, weights, strict=True), start=1) if g and w]
    want = {f"hidden/{m}-{g}": w / (len(active) if average else 1) for m, g, w in active}
    got = dict(zip(losses.term_names, losses.coefficients, strict=True))
    assert {name: c for name, c in got.items() if name.startswith("hidden/")} == pytest.approx(want)
    assert losses.wanted_student.hidden == {0, *(m for m, _, _ in active)}
    assert losses.wanted_teacher.hidden == {0, *(g for _, g, _ in active)}
    assert any("loss.hidden" in warning for warning in losses.warnings) == (not active)


def tinybert_as_released(student: Features, teacher: Features, batch: Batch, projection: nn.Linear) -> torch.Tensor:
    """general_distill.py written anew: nn.MSELoss over everything, pads included, one fit_dense for every state."""
    mse = nn.MSELoss()
    L = batch.input_ids.shape[1]
    additive = (1.0 - batch.attention_mask.double())[:, None, None, :].expand(-1, STUDENT.heads, L, L) * -10000.0
    attention_loss, state_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    per_block = TEACHER.layers // STUDENT.layers
    for i in range(STUDENT.layers):
        maps = []
        for features, layer in ((student, i + 1), (teacher, i * per_block + per_block - 1 + 1)):  # theirs: from 0
            q, k = features.query[layer].double(), features.key[layer].double()
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5 + additive
            maps.append(torch.where(scores <= -1e2, torch.zeros_like(scores), scores))
        attention_loss = attention_loss + mse(*maps)
    for i in range(STUDENT.layers + 1):
        state = student.hidden[i].double()
        fitted = torch.einsum("bli,oi->blo", state, projection.weight.double()) + projection.bias.double()
        state_loss = state_loss + mse(fitted, teacher.hidden[i * per_block].double())
    return attention_loss + state_loss


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tinybert_preset_is_the_released_loss(dtype):
    config = LossConfig(preset="tinybert")
    losses = make_set({"preset": "tinybert"})
    batch = make_batch([5, 9, 3], 13, masking=False)
    with torch.no_grad():
        teacher = TinyEncoder(TEACHER, 2, dtype).capture(batch, losses.wanted_teacher)
        for layer in teacher.query:
            teacher.query[layer] *= 300  # some scores of real tokens fall below -100
    scores = teacher.query[12] @ teacher.key[12].mT * teacher.scaling[12]
    assert 0 < (scores[..., :3] < -100).float().mean() < 0.5
    gradients = []
    for compute in ("ours", "theirs"):
        student = TinyEncoder(STUDENT, 1, dtype)
        projections = make_projections(losses, config, dtype)
        features = student.capture(batch, losses.wanted_student)
        if compute == "ours":
            total, terms = losses(features, teacher, batch, batch.counts, projections)
            assert terms.shape == (4 + 4 + 1 + 4,)
        else:
            total = tinybert_as_released(features, teacher, batch, projections.linears["all"])
        (0.37 * total).backward()
        parameters = [*student.named_parameters(), *projections.named_parameters()]
        gradients.append({"total": total.detach(), **{name: p.grad for name, p in parameters if p.grad is not None}})
    ours, theirs = gradients
    assert set(ours) == set(theirs)
    assert {"linears.all.weight", "linears.all.bias", "embeddings.weight"} < set(ours)
    for name, want in theirs.items():
        assert_close(name, want, ours[name], dtype)


def test_tinybert_means_over_micro_batches_of_one_length_are_the_global_mean():
    config = LossConfig(preset="tinybert")
    (want_values,), want = global_gradient(config, split(8, padded_to=9, masking=False))
    (values,), got = global_gradient(config, split(2, padded_to=9, masking=False))
    assert_close("values", want_values, values)
    for a, b in zip(want, got, strict=True):
        assert_close("gradient", a, b)


def test_the_mapping_table_of_the_documentation():
    """Rows like `| 4 of 12 | uniform | 3-6-9-12 |` in docs/losses.md."""
    text = (ROOT / "docs" / "losses.md").read_text()
    rows = re.findall(r"^\| (\d+) of (\d+) \| `([a-z-]+)` \| `([\d-]+)` \|", text, re.MULTILINE)
    assert len(rows) >= 10
    for students, teachers, preset, genes in rows:
        sizes = {"student_layers": int(students), "teacher_layers": int(teachers)}
        assert str(parse_mapping(preset, **sizes)) == genes
