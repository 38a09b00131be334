"""Captured tensors against what transformers itself returns, for every supported family."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import FAMILIES, OWN_PROJECTIONS, REAL, VOCAB, make_batch, real_teacher, tiny_config, tiny_model
from transformers import BertModel, MobileBertConfig, MobileBertForMaskedLM

from engine.data.batch import Batch, Counts
from engine.errors import UserError
from engine.kernels.choice import Kernels
from engine.kernels.inputs import MlmLogits, Weights
from engine.models.attention import _eager_of, eager_attention, resolve_backend
from engine.models.capture import capture, layer_modules
from engine.models.features import Features, Wanted
from engine.models.install import install
from engine.models.mlm_head import MlmHead, WholeLogits
from engine.models.student import enable_activation_checkpointing

EVERYTHING = Wanted(hidden=frozenset(range(5)), attention=frozenset(range(1, 5)), values=True)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def assert_same(got: Features, want: Features, **tolerance: float) -> None:
    for name in ("hidden", "query", "key", "value"):
        left, right = getattr(got, name), getattr(want, name)
        assert left.keys() == right.keys()
        for layer in left:
            torch.testing.assert_close(left[layer], right[layer], **tolerance)


@every_family
@every_backend
@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states_match_transformers(family: str, backend: str, padded: bool) -> None:
    batch = make_batch(padded=padded)
    model = tiny_model(family)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        install(model, backend)
        got = capture(model, batch, EVERYTHING)
    assert sorted(got.hidden) == list(range(len(want.hidden_states))) == list(range(5))
    real = torch.ones_like(batch.input_ids).bool() if batch.token_mask is None else batch.token_mask
    for k, reference in enumerate(want.hidden_states):
        torch.testing.assert_close(got.hidden[k][real], reference[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in OWN_PROJECTIONS])
def test_queries_and_keys_give_transformers_probabilities(family: str) -> None:
    batch = make_batch(padded=False, length=4)  # inside ModernBERT's window, so no mask at all
    model = tiny_model(family)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(batch.input_ids, output_attentions=True).attentions
        install(model, "sdpa")
        got = capture(model, batch, EVERYTHING)
    assert len(want) == 4
    for layer in range(1, 5):
        scores = got.query[layer] @ got.key[layer].mT * got.scaling[layer]
        torch.testing.assert_close(scores.softmax(-1), want[layer - 1], atol=1e-5, rtol=1e-4)
        assert got.value[layer].shape == got.query[layer].shape == (3, 4, 4, 12)


@every_family
@every_backend
def test_no_mask_equals_a_mask_of_ones(family: str, backend: str) -> None:
    batch = make_batch(padded=False)
    ones = Batch(batch.input_ids, torch.ones_like(batch.input_ids), None, batch.counts)
    model = tiny_model(family)
    install(model, backend)
    with torch.no_grad():
        assert_same(capture(model, batch, EVERYTHING), capture(model, ones, EVERYTHING), atol=1e-6, rtol=1e-5)


@every_family
@every_backend
def test_pads_do_not_change_real_tokens(family: str, backend: str) -> None:
    batch = make_batch()
    assert batch.attention_mask is not None
    model = tiny_model(family)
    install(model, backend)
    with torch.no_grad():
        got = capture(model, batch, EVERYTHING)
        row, length = 1, int(batch.attention_mask[1].sum())
        alone = capture(model, Batch(batch.input_ids[row : row + 1, :length], None, None, Counts()), EVERYTHING)
    for k in range(5):
        torch.testing.assert_close(got.hidden[k][row, :length], alone.hidden[k][0], atol=2e-5, rtol=1e-4)


@every_family
@every_backend
@pytest.mark.parametrize("share", [0.4, 0.0, None])
def test_logits_of_chosen_positions_match_full_logits(family: str, backend: str, share: float | None) -> None:
    batch = make_batch(labels=share)
    model = tiny_model(family, mlm=True)
    install(model, backend)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    got = capture(model, batch, Wanted(hidden=frozenset({4}), logits=True))
    chosen = batch.attention_mask.bool() if batch.labels is None else batch.labels != -100  # type: ignore[union-attr]
    assert got.logits is not None
    assert got.logits.shape == (int(chosen.sum()), VOCAB)
    assert isinstance(got.mlm_head, MlmHead), "logits need not exist all at once"
    torch.testing.assert_close(got.logits, full[chosen], atol=1e-5, rtol=1e-4)
    assert got.hidden[4].shape == (3, 11, 48), "the gathering must not touch the hidden states"
    got.logits.sum().backward()  # also with P = 0: every parameter takes part, its gradient is 0
    head = model.get_output_embeddings().weight
    assert head.grad is not None
    assert bool(head.grad.any()) == bool(chosen.any())


def test_a_head_that_does_more_than_one_product_gives_its_logits_whole() -> None:
    """MobileBERT multiplies by the decoder's weights, with more columns beside them, without calling the decoder."""
    torch.manual_seed(0)
    config = MobileBertConfig(
        vocab_size=VOCAB, hidden_size=24, embedding_size=12, intra_bottleneck_size=12, num_attention_heads=2,
        num_hidden_layers=2, intermediate_size=16, true_hidden_size=12,
    )  # fmt: skip
    model = MobileBertForMaskedLM(config).eval()
    install(model, "eager")
    batch = make_batch(labels=0.3)
    assert batch.labels is not None
    got = capture(model, batch, Wanted(logits=True))
    assert isinstance(got.mlm_head, WholeLogits)
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(got.logits, full[batch.labels != -100], atol=1e-5, rtol=1e-4)
    labels = batch.labels[batch.labels != -100]
    by = Weights(kl=0.0, cross_entropy=1.0, temperature=1.0, count=float(len(labels)))
    total, _ = got.mlm_head(lambda head: Kernels().vocabulary_losses(MlmLogits(head, None, labels, by)))
    want = torch.nn.functional.cross_entropy(full[batch.labels != -100], labels)
    torch.testing.assert_close(total, want, atol=1e-6, rtol=1e-5)


def test_logits_with_and_without_host_counts_agree() -> None:
    batch = make_batch(labels=0.5)
    model = tiny_model("bert", mlm=True)
    install(model, "sdpa")
    wanted = Wanted(logits=True)
    uncounted = capture(model, Batch(batch.input_ids, batch.attention_mask, batch.labels, Counts()), wanted).logits
    torch.testing.assert_close(capture(model, batch, wanted).logits, uncounted)
    unpadded = make_batch(padded=False)
    logits = capture(model, unpadded, wanted).logits
    assert logits is not None
    torch.testing.assert_close(logits, model(unpadded.input_ids).logits.flatten(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("albert", "mpnet")])
@every_backend
def test_gradients_with_and_without_checkpointing_agree(family: str, backend: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(family, seed=3).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0
        install(model, backend)
        if checkpointing:
            enable_activation_checkpointing(model)
        got = capture(model, make_batch(), EVERYTHING)
        tensors = [*got.hidden.values(), *got.query.values(), *got.key.values(), *got.value.values()]
        sum((t * torch.linspace(-1, 1, t.shape[-1])).square().mean() for t in tensors).backward()  # type: ignore[union-attr]
        assert len(got.query) == 4, "recomputation in the backward pass must not capture"
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    assert len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_checkpointing_recomputes_and_keeps_less() -> None:
    def saved_bytes(checkpointing: bool) -> int:
        model = tiny_model("bert").train()
        install(model, "eager")
        if checkpointing:
            enable_activation_checkpointing(model)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = capture(model, make_batch(length=32), Wanted(hidden=frozenset({4})))
        features.hidden[4].sum().backward()
        return sum(sizes.values())

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@pytest.mark.parametrize("family", ["albert", "mpnet"])
def test_some_have_no_activation_checkpointing(family: str) -> None:
    with pytest.raises(UserError, match=rf"student.activation_checkpointing.*{family}"):
        enable_activation_checkpointing(tiny_model(family))


@every_family
def test_autocast_and_backends_agree(family: str) -> None:
    model = tiny_model(family)
    results = []
    for backend in ("sdpa", "eager"):
        install(model, backend)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append(capture(model, make_batch(padded=False), EVERYTHING))
    assert results[0].query[1].dtype == torch.bfloat16 or family == "modernbert"
    assert_same(results[0], results[1], atol=0.25, rtol=0.1)


def test_only_what_is_wanted_is_kept() -> None:
    model = tiny_model("bert")
    install(model, "sdpa")
    got = capture(model, make_batch(), Wanted(hidden=frozenset({0, 3}), attention=frozenset({2})))
    assert (sorted(got.hidden), sorted(got.query), sorted(got.value), got.logits) == ([0, 3], [2], [], None)
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in layer_modules(model)]
    assert [(len(after), len(before)) for after, before in hooks] == [(0, 1), (0, 0), (0, 0), (1, 0)], (
        "those of packing"
    )


def test_generic_eager_equals_the_models_own() -> None:
    query, key, value = torch.randn(3, 2, 4, 7, 8).unbind()
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 5:] = torch.finfo(torch.float32).min
    module = torch.nn.Module().eval()
    from transformers.models.bert.modeling_bert import eager_attention_forward

    ours, theirs = (f(module, query, key, value, mask, scaling=0.3) for f in (eager_attention, eager_attention_forward))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    grouped = eager_attention(module, query, key[:, :2], value[:, :2], None)[0]
    repeated = eager_attention(
        module, query, key[:, :2].repeat_interleave(2, 1), value[:, :2].repeat_interleave(2, 1), None
    )
    torch.testing.assert_close(grouped, repeated[0])


def test_a_model_with_an_eager_function_of_its_own_keeps_it() -> None:
    from transformers.models.modernbert import modeling_modernbert
    from transformers.models.roberta import modeling_roberta

    tiny_model("bert"), tiny_model("modernbert")
    assert _eager_of("transformers.models.bert.modeling_bert") is eager_attention
    assert _eager_of(modeling_roberta.__name__) is eager_attention
    assert _eager_of(modeling_modernbert.__name__) is modeling_modernbert.eager_attention_forward


def test_a_missing_layer_is_an_error_not_a_silent_zero() -> None:
    model = tiny_model("bert")
    install(model, "sdpa")
    with pytest.raises(RuntimeError, match=r"\[5\] were not captured"):
        capture(model, make_batch(), Wanted(attention=frozenset({5})))
    never_installed = BertModel(tiny_config("bert"), add_pooling_layer=False)
    with pytest.raises(RuntimeError, match="install"):
        capture(never_installed, make_batch(), Wanted(attention=frozenset({1})))
    with pytest.raises(RuntimeError, match="MLM head"):
        capture(model, make_batch(), Wanted(logits=True))


def test_resolve_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def pick(requested: str, device: torch.device, dtype: torch.dtype, length: int, **more: bool) -> str:
        return resolve_backend(requested, device=device, dtype=dtype, seq_len=length, head_dim=32, **more)[0]

    assert pick("auto", cpu, torch.bfloat16, 64) == "eager"
    assert pick("auto", cpu, torch.bfloat16, 64, training=False) == "sdpa"
    assert pick("auto", cpu, torch.bfloat16, 1024) == "sdpa"
    assert pick("auto", cpu, torch.float32, 64) == "sdpa"
    assert pick("auto", cuda, torch.bfloat16, 64) == "sdpa"
    assert pick("eager", cuda, torch.bfloat16, 64) == "eager"
    with pytest.raises(UserError, match="attention='flash_attention_2'"):
        pick("flash_attention_2", cpu, torch.bfloat16, 64)


@pytest.mark.parametrize("name", REAL)
def test_real_teacher_matches_transformers(name: str) -> None:
    model = BertModel.from_pretrained(real_teacher(name), add_pooling_layer=False).eval()
    batch = make_batch(length=17)
    layers = REAL[name]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
        install(model, "sdpa")
        got = capture(model, batch, Wanted(frozenset(range(layers + 1)), frozenset({1, layers})))
    real = batch.token_mask
    for k in range(layers + 1):
        torch.testing.assert_close(got.hidden[k][real], want[k][real], atol=1e-4, rtol=1e-4)
