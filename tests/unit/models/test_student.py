"""Student configurations and models: sizes, defaults, errors, dropout, determinism, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_encoders import (
    FAMILIES,
    REAL,
    VOCAB,
    make_batch,
    real_teacher,
    require_modernbert,
    save_tiny,
    tiny_config,
    tiny_model,
)
from transformers import AutoConfig, AutoModel, ModernBertConfig, PretrainedConfig, PreTrainedModel

from engine.config.distill import StudentConfig
from engine.errors import UserError
from engine.mapping import LayerMapping
from engine.models.capture import capture, layer_modules
from engine.models.features import Wanted
from engine.models.hub import SavedModel, shape_of
from engine.models.initialise import intermediate_size
from engine.models.install import install
from engine.models.student import DROPOUTS, build_student, build_student_config, new_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def build(cfg: StudentConfig, path: str, *, mlm: bool = False, seed: int = 0, backend: str = "sdpa") -> PreTrainedModel:
    teacher = SavedModel.read("teacher.path", path)
    given = None if cfg.path is None else SavedModel.read("student.path", cfg.path)
    return build_student(cfg, teacher, given, LayerMapping((0, 3), 4), mlm, seed, backend)


@every_family
def test_defaults_and_sizes(family: str) -> None:
    teacher = tiny_config(family)
    default = build_student_config(StudentConfig(), teacher)
    shape = shape_of(default, has_mlm_head=False)
    assert type(default) is type(teacher)
    assert (shape.layers, shape.width, shape.heads, shape.vocab) == (2, 48, 4, VOCAB)
    assert intermediate_size(default) == intermediate_size(teacher)
    cfg = StudentConfig(layers=3, hidden_size=24, heads=2, dropout=0.0)
    small = build_student_config(cfg, teacher)
    shape = shape_of(small, has_mlm_head=False)
    assert (shape.layers, shape.width, shape.heads) == (3, 24, 2)
    assert intermediate_size(small) == intermediate_size(teacher) // 2
    assert intermediate_size(build_student_config(StudentConfig(intermediate_size=10), teacher)) == 10
    assert shape_of(teacher, has_mlm_head=False).layers == 4, "the teacher's configuration is left alone"


@every_family
@pytest.mark.parametrize("mlm", [False, True])
def test_every_family_trains(family: str, mlm: bool, tmp_path: Path) -> None:
    student = build(StudentConfig(layers=3, hidden_size=24, heads=2), save_tiny(family, tmp_path), mlm=mlm)
    assert student.training
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    wanted = Wanted(frozenset({0, 3}), frozenset({1, 3}), values=True, logits=mlm)
    got = capture(student, make_batch(labels=0.5), wanted)
    assert got.hidden[3].shape == (3, 11, 24)
    assert got.query[3].shape == (3, 2, 11, 12)
    loss = got.hidden[3].square().mean() + got.query[1].square().mean()
    if got.logits is not None:
        loss = loss + got.logits.square().mean()
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None]
    assert not without, "a parameter without a gradient: is there a pooler?"


@every_family
def test_dropout_is_the_setting(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    config = build_student_config(StudentConfig(dropout=0.3), tiny_config(family))
    present = [name for name in DROPOUTS if hasattr(config, name)]
    assert len(present) >= 2
    assert {getattr(config, name) for name in present} == {0.3}
    batch, wanted = make_batch(), Wanted(hidden=frozenset({2}))
    still, noisy = build(StudentConfig(), path), build(StudentConfig(dropout=0.3), path)
    assert torch.equal(capture(still, batch, wanted).hidden[2], capture(still, batch, wanted).hidden[2])
    assert not torch.equal(capture(noisy, batch, wanted).hidden[2], capture(noisy, batch, wanted).hidden[2])


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", {"hidden_dropout_prob", "attention_probs_dropout_prob"}),
        ("distilbert", {"dropout", "attention_dropout"}),
        ("modernbert", {"attention_dropout", "embedding_dropout", "mlp_dropout"}),
    ],
)
def test_dropout_names(family: str, names: set[str]) -> None:
    config = build_student_config(StudentConfig(dropout=0.25), tiny_config(family))
    assert {name for name, value in config.to_dict().items() if value == 0.25} == names


def test_task_dropouts_are_left_alone() -> None:
    teacher = tiny_config("distilbert")
    student = build_student_config(StudentConfig(dropout=0.0), teacher)
    assert student.seq_classif_dropout == teacher.seq_classif_dropout == 0.2
    assert student.qa_dropout == 0.1


def test_embedding_size() -> None:
    teacher = tiny_config("electra")
    assert build_student_config(StudentConfig(hidden_size=12, heads=2), teacher).embedding_size == 16
    teacher.embedding_size = 48
    assert build_student_config(StudentConfig(hidden_size=12, heads=2), teacher).embedding_size == 12


def test_layer_types_follow_the_source() -> None:
    teacher = tiny_config("modernbert")
    full, sliding = "full_attention", "sliding_attention"
    assert teacher.layer_types == [full, sliding, sliding, full]
    assert build_student_config(StudentConfig(layers=2), teacher).layer_types == [full, sliding]
    assert build_student_config(StudentConfig(layers=3), teacher, (4, 0, 1)).layer_types == [full, sliding, full]


def test_bad_heads() -> None:
    teacher = tiny_config("bert")
    with pytest.raises(
        UserError, match=r"student.heads=5 must divide student.hidden_size=24: choose one of 1, 2, 3, 4, 6"
    ):
        build_student_config(StudentConfig(hidden_size=24, heads=5), teacher)
    with pytest.raises(UserError, match=r"student.heads=4 must divide student.hidden_size=30"):
        build_student_config(StudentConfig(hidden_size=30), teacher)
    with pytest.raises(UserError, match=r"student.heads=4: heads of width 9 are odd"):
        build_student_config(StudentConfig(hidden_size=36), tiny_config("modernbert"))


@every_family
def test_deterministic_and_leaves_the_random_state_alone(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    before = torch.get_rng_state()
    one, two, other = build(StudentConfig(), path), build(StudentConfig(), path), build(StudentConfig(), path, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every_family
def test_from_a_folder(family: str, tmp_path: Path) -> None:
    teacher, path = save_tiny("bert", tmp_path / "teacher"), save_tiny(family, tmp_path / "student", seed=5)
    student = build(StudentConfig(path=path), teacher)
    want = tiny_model(family, seed=5).state_dict()
    assert student.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in student.state_dict().items())
    assert {getattr(student.config, n) for n in DROPOUTS if hasattr(student.config, n)} == {0.0}
    headed = build(StudentConfig(path=path), teacher, mlm=True)  # no head in the file: it starts at random
    assert torch.equal(headed.get_output_embeddings().weight, headed.get_input_embeddings().weight)
    body = headed.base_model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in body.items())
    saved = save_tiny(family, tmp_path / "headed", mlm=True, seed=6)
    again = build(StudentConfig(path=saved), teacher, mlm=True).state_dict()
    assert all(torch.equal(again[name], t) for name, t in tiny_model(family, mlm=True, seed=6).state_dict().items())


@every_family
def test_saved_student_loads_as_a_plain_model(family: str, tmp_path: Path) -> None:
    student = build(StudentConfig(layers=2, hidden_size=24, heads=2), save_tiny(family, tmp_path / "teacher"))
    student.save_pretrained(tmp_path / "student")
    saved = AutoConfig.from_pretrained(tmp_path / "student")
    assert "mapdistill" not in (tmp_path / "student" / "config.json").read_text(encoding="utf-8")
    assert type(saved) is type(student.config)
    plain = AutoModel.from_pretrained(tmp_path / "student").eval()
    batch = make_batch()
    with torch.no_grad():
        want = capture(student.eval(), batch, Wanted(hidden=frozenset({2}))).hidden[2]
        got = plain(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    real = batch.attention_mask.bool()  # type: ignore[union-attr]
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_is_an_option(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    plain, frugal = build(StudentConfig(), path), build(StudentConfig(activation_checkpointing=True), path)
    assert not any(layer.gradient_checkpointing for layer in layer_modules(plain))
    assert all(layer.gradient_checkpointing for layer in layer_modules(frugal))


def test_default_layers_of_real_modernbert_shape() -> None:
    require_modernbert()
    config: PretrainedConfig = ModernBertConfig()
    student = build_student_config(StudentConfig(), config)
    assert student.num_hidden_layers == 11
    assert len(student.layer_types) == 11


@pytest.mark.parametrize("name", REAL)
def test_real_teacher_all_layers_copied_gives_its_outputs(name: str) -> None:
    path, layers = real_teacher(name), REAL[name]
    teacher = SavedModel.read("teacher.path", path)
    same = StudentConfig(layers=layers, init="-".join(map(str, range(1, layers + 1))))
    student = build_student(same, teacher, None, None, False, 0, "sdpa").eval()
    plain = AutoModel.from_pretrained(path).eval()
    batch = make_batch(length=16)
    with torch.no_grad():
        got = capture(student, batch, Wanted(hidden=frozenset({layers}))).hidden[layers]
        want = plain(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert torch.equal(got, want)
    narrow = StudentConfig(layers=3, hidden_size=192, heads=12, init="every-other")
    small = build_student(narrow, teacher, None, None, False, 0, "sdpa")
    assert torch.equal(small.get_input_embeddings().weight, plain.get_input_embeddings().weight[:, ::2]), (
        "384 -> 192 takes every second unit"
    )


@pytest.mark.parametrize("kind", ["EuroBert", "NomicBert"])
def test_head_widths_that_a_configuration_writes_out_follow_the_student(kind: str) -> None:
    config_class = getattr(transformers, f"{kind}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    teacher = config_class(**sizes, intermediate_size=64, max_position_embeddings=40)

    def student(**settings: int) -> PreTrainedModel:
        return new_model(build_student_config(StudentConfig(layers=2, **settings), teacher), False, 0)

    def parameters(model: PreTrainedModel) -> int:
        return sum(p.numel() for p in model.parameters())

    whole = parameters(student())
    for heads in (2, 8):
        assert parameters(student(heads=heads)) == whole
    narrow = student(hidden_size=24)
    assert next(m for name, m in narrow.named_modules() if name.endswith("q_proj")).weight.shape == (24, 24)
    assert 0.25 * whole < parameters(narrow) < 0.35 * whole
    install(narrow, "eager")
    assert capture(narrow, make_batch(), Wanted(attention=frozenset({2}))).query[2].shape == (3, 4, 11, 6)


def test_key_and_value_heads_stay_shared_as_in_the_teacher() -> None:
    config_class = getattr(transformers, "EuroBertConfig", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no EuroBERT")
    teacher = config_class(
        vocab_size=VOCAB, hidden_size=48, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0
    )
    assert build_student_config(StudentConfig(layers=2, heads=4), teacher).num_key_value_heads == 1
    with pytest.raises(UserError, match=r"student.heads=6: 4 query heads .* choose a multiple of 4"):
        build_student_config(StudentConfig(layers=2, heads=6), teacher)
