"""The frozen teacher: exact when truncated, deeper layers never run, refuses train mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_encoders import FAMILIES, REAL, make_batch, real_teacher, save_tiny, tiny_config, tiny_model
from transformers import AlbertConfig, AutoModelForMaskedLM, BertModel, PretrainedConfig

from engine.errors import UserError
from engine.hub.config import load_config
from engine.hub.tokenizer import load_tokenizer
from engine.models.capture import capture, layer_modules
from engine.models.features import Features, Wanted
from engine.models.hub import SavedModel, has_head, load_backbone, shape_of
from engine.models.install import install
from engine.models.student import new_model
from engine.models.teacher import FrozenTeacher, truncated_config

every_family = pytest.mark.parametrize("family", FAMILIES)


def load(path: str, wanted: Wanted, dtype: torch.dtype = torch.float32, backend: str = "sdpa") -> FrozenTeacher:
    return FrozenTeacher.load(
        SavedModel.read("teacher.path", path), wanted=wanted, dtype=dtype, device=torch.device("cpu"), backend=backend
    )


def assert_equal(got: Features, want: Features) -> None:
    for name in ("hidden", "query", "key", "value", "scaling"):
        left, right = getattr(got, name), getattr(want, name)
        assert left.keys() == right.keys(), name
        for layer in left:
            if name == "scaling":
                assert left[layer] == right[layer]
            else:
                assert torch.equal(left[layer], right[layer]), (name, layer)


@every_family
@pytest.mark.parametrize("deepest", [0, 1, 3, 4])
def test_truncation_is_exact_and_deeper_layers_are_not_run(family: str, deepest: int, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    wanted = Wanted(frozenset({0, deepest}), frozenset({deepest} if deepest else ()), values=True)
    teacher = load(path, wanted)
    whole = tiny_model(family)
    install(whole, "sdpa")
    calls = []
    for layer in layer_modules(teacher._model):
        layer.register_forward_hook(lambda *_: calls.append(1))
    got = teacher(make_batch())
    with torch.no_grad():
        assert_equal(got, capture(whole, make_batch(), wanted))
    assert len(calls) == deepest
    assert teacher.layers_loaded == max(1, deepest)
    assert not any(t.requires_grad for t in (*got.hidden.values(), *got.query.values()))
    assert teacher.full_parameters_count == sum(p.numel() for p in whole.parameters())
    if family == "albert" or deepest == 4:
        assert teacher.parameters_count == teacher.full_parameters_count
    else:
        assert teacher.parameters_count < teacher.full_parameters_count


@every_family
def test_truncated_model_gives_inner_hidden_states_to_the_end(family: str, tmp_path: Path) -> None:
    """As under ZeRO-3, where the forward is not left early: a final norm must not touch an inner hidden state."""
    path, wanted = save_tiny(family, tmp_path), Wanted(frozenset({2}), frozenset({2}))
    shallow, whole = truncated_config(load_config(path, "teacher.path"), 2), tiny_model(family)
    short = load_backbone(path, key="teacher.path", config=shallow).eval()
    for model in (short, whole):
        install(model, "sdpa")
    with torch.no_grad():
        assert_equal(capture(short, make_batch(), wanted), capture(whole, make_batch(), wanted))


@pytest.mark.parametrize("groups", [{"num_hidden_groups": 2}, {"inner_group_num": 2, "num_hidden_layers": 2}])
@pytest.mark.parametrize("deepest", [2, 3])
def test_albert_with_several_groups(groups: dict[str, int], deepest: int, tmp_path: Path) -> None:
    config = AlbertConfig.from_dict({**tiny_config("albert").to_dict(), **groups})
    whole = new_model(config, with_mlm_head=False, seed=0).eval()
    whole.save_pretrained(tmp_path)
    wanted = Wanted(frozenset({1, deepest}), frozenset({deepest}))
    teacher = load(str(tmp_path), wanted)
    assert teacher.shape.layers == 4
    calls = []
    for layer in layer_modules(teacher._model):
        layer.register_forward_hook(lambda *_: calls.append(1))
    install(whole, "sdpa")
    with torch.no_grad():
        assert_equal(teacher(make_batch()), capture(whole, make_batch(), wanted))
    assert len(calls) == deepest


@every_family
def test_logits_keep_all_layers_and_the_head(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, mlm=True)
    teacher = load(path, Wanted(hidden=frozenset({1}), logits=True))
    batch = make_batch(labels=0.5)
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    with torch.no_grad():
        full = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert batch.labels is not None
    torch.testing.assert_close(teacher(batch).logits, full[batch.labels != -100], atol=1e-5, rtol=1e-4)
    assert teacher.layers_loaded == 4
    assert teacher.shape.has_mlm_head


def has_mlm_head(path: str) -> bool:
    return SavedModel.read("teacher.path", path).has_mlm_head


@every_family
def test_mlm_head_is_detected_in_the_file(family: str, tmp_path: Path) -> None:
    with_head, without = save_tiny(family, tmp_path / "a", mlm=True), save_tiny(family, tmp_path / "b")
    assert has_mlm_head(with_head)
    assert not has_mlm_head(without)
    body = load(with_head, Wanted(hidden=frozenset({4})))  # the head's weights are left in the file, without noise
    assert torch.equal(
        body(make_batch()).hidden[4], load(with_head, Wanted(frozenset({4}), logits=True))(make_batch()).hidden[4]
    )


def test_train_mode_is_refused(tmp_path: Path) -> None:
    teacher = load(save_tiny("bert", tmp_path), Wanted(hidden=frozenset({2})))
    assert not any(p.requires_grad for p in teacher._model.parameters())
    teacher._model.encoder.layer[0].train()
    with pytest.raises(RuntimeError, match="train mode"):
        teacher(make_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    wanted = Wanted(frozenset({0, 3}), frozenset({3}))
    teacher = load(path, wanted, dtype)
    got, exact = teacher(make_batch()), load(path, wanted)(make_batch())
    assert teacher.dtype == got.hidden[3].dtype == got.query[3].dtype == dtype
    torch.testing.assert_close(got.hidden[3].float(), exact.hidden[3], atol=0.15, rtol=0.05)
    assert teacher.resident_bytes() == 2 * teacher.parameters_count


def test_flops(tmp_path: Path) -> None:
    D, F, L = 48, 64, 32
    layer = 2 * (4 * D * D + 2 * D * F)
    teacher = load(save_tiny("bert", tmp_path / "bert"), Wanted(hidden=frozenset({3})))
    assert teacher.flops_per_token(L) == 3 * (layer + 4 * L * D)
    albert = load(save_tiny("albert", tmp_path / "albert"), Wanted(hidden=frozenset({3})))
    assert albert.flops_per_token(L) == 2 * 16 * D + 3 * (layer + 4 * L * D)  # one shared layer, run three times


@every_family
def test_shape_of_families(family: str) -> None:
    shape = shape_of(tiny_config(family), has_mlm_head=True)
    assert (shape.layers, shape.width, shape.heads, shape.vocab, shape.has_mlm_head) == (4, 48, 4, 53, True)


def test_errors_name_key_value_and_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = Wanted(hidden=frozenset({1}))
    with pytest.raises(UserError, match=r"teacher.path=.*no config.json"):
        load(str(tmp_path), wanted)
    with pytest.raises(UserError, match=r"teacher.path='no/such-model'.*no such folder.*hub"):
        load("no/such-model", wanted)
    with pytest.raises(UserError, match=r"student.path='no/such-model'"):
        load_config("no/such-model", "student.path")
    with pytest.raises(UserError, match=r"teacher.path=.*tokenizer"):
        load_tokenizer(save_tiny("bert", tmp_path / "untokenised"), "teacher.path")
    tiny_config("bert").save_pretrained(tmp_path / "weightless")
    with pytest.raises(UserError, match=r"teacher.path=.*weights"):
        load(str(tmp_path / "weightless"), wanted)
    with pytest.raises(UserError, match="no weights"):
        has_head(str(tmp_path / "weightless"), key="teacher.path", config=tiny_config("bert"), head="mlm")
    path = save_tiny("bert", tmp_path / "short")
    deeper = PretrainedConfig.get_config_dict(path)[0] | {"num_hidden_layers": 6}
    type(tiny_config("bert")).from_dict(deeper).save_pretrained(path)
    with pytest.raises(UserError, match=r"\d+ weights are missing.*encoder.layer.4"):
        load(path, Wanted(hidden=frozenset({6})))
    (Path(path) / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match=r"teacher.path: .*no safetensors file"):
        load(path, wanted)


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save_tiny("bert", tmp_path, mlm=True)
    capfd.readouterr()
    load(path, Wanted(hidden=frozenset({2})))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("name", REAL)
def test_real_teacher(name: str) -> None:
    path = real_teacher(name)
    deepest = REAL[name] - 2
    wanted = Wanted(frozenset({0, deepest}), frozenset({deepest}))
    teacher = load(path, wanted)
    whole = BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    install(whole, "sdpa")
    with torch.no_grad():
        assert_equal(teacher(make_batch(length=16)), capture(whole, make_batch(length=16), wanted))
    assert teacher.full_parameters_count - teacher.parameters_count == 2 * 1_774_464
    assert not has_mlm_head(path)
    assert len(load_tokenizer(path, "teacher.path")("A real sentence.")["input_ids"]) > 3
