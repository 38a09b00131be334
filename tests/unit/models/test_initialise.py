"""Copying teacher layers into a student and taking part of a width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES, make_batch, save_tiny, tiny_config, tiny_model
from transformers import AlbertConfig, PreTrainedModel

from engine.config.distill import StudentConfig
from engine.errors import UserError
from engine.mapping import LayerMapping
from engine.models.capture import capture, layer_modules
from engine.models.features import Wanted
from engine.models.hub import SavedModel
from engine.models.initialise import NARROWABLE, copy_from_teacher, evenly_spaced, resolve_init
from engine.models.install import install
from engine.models.student import build_student, build_student_config, new_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def build(cfg: StudentConfig, path: str, *, mlm: bool = False, mapping: LayerMapping | None = None) -> PreTrainedModel:
    given = None if cfg.path is None else SavedModel.read("student.path", cfg.path)
    return build_student(cfg, SavedModel.read("teacher.path", path), given, mapping, mlm, 0, "sdpa")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("random", (0, 0, 0, 0)),
        ("uniform", (3, 6, 9, 12)),
        ("every-other", (2, 4, 6, 8)),
        ("first", (1, 2, 3, 4)),
        ("last", (9, 10, 11, 12)),
        ("0-3-7-11", (0, 3, 7, 11)),
        ("mapping", (0, 5, 0, 10)),
    ],
)
def test_resolve_init(text: str, want: tuple[int, ...]) -> None:
    assert resolve_init(text, 4, 12, LayerMapping((0, 5, 0, 10), 12)) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-3-7", "student.init='0-3-7' has 3 layers, but the student has 4"),
        ("0-3-7-13", "student.init: mapping 0-3-7-13.*13"),
        ("all-last", "student.init='all-last': choose random, mapping"),
        ("random:3", "student.init='random:3': choose random"),
        ("mapping", "student.init='mapping' needs a hidden-state mapping"),
    ],
)
def test_bad_init(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_init(text, 4, 12, None)


def test_init_that_needs_more_teacher_layers() -> None:
    with pytest.raises(UserError, match=r"student.init='every-other': 4 student layers need a teacher with 8"):
        resolve_init("every-other", 4, 7, None)
    with pytest.raises(UserError, match=r"student.init='last'"):
        resolve_init("last", 4, 3, None)


def test_evenly_spaced() -> None:
    assert evenly_spaced(3, 12).tolist() == [0, 4, 8]
    assert evenly_spaced(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(5, 12).tolist() == [0, 3, 6, 8, 11]
    assert evenly_spaced(312, 768).tolist() == torch.linspace(0, 767, 312, dtype=torch.float64).round().long().tolist()
    assert len(set(evenly_spaced(312, 768).tolist())) == 312
    assert evenly_spaced(1, 7).tolist() == [0]


@every_family
@pytest.mark.parametrize("mlm", [False, True])
def test_all_layers_copied_gives_the_teachers_outputs(family: str, mlm: bool, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path, mlm=mlm)
    student = build(StudentConfig(layers=4, init="1-2-3-4"), path, mlm=mlm).eval()
    teacher = tiny_model(family, mlm=mlm)
    install(teacher, "sdpa")
    wanted = Wanted(frozenset(range(5)), frozenset(range(1, 5)), logits=mlm)
    with torch.no_grad():
        got, want = (capture(model, make_batch(labels=0.5), wanted) for model in (student, teacher))
    assert all(torch.equal(got.hidden[k], want.hidden[k]) for k in want.hidden)
    assert all(torch.equal(got.query[k], want.query[k]) for k in want.query)
    if mlm:
        assert got.logits is not None
        assert want.logits is not None
        assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "albert"])
def test_named_layers_and_embeddings_are_copied_and_0_stays_random(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    teacher = tiny_model(family)
    student = build(StudentConfig(layers=3, init="2-0-4"), path)
    fresh = build(StudentConfig(layers=3), path)
    source = layer_modules(teacher)
    for m, g in enumerate((2, 0, 4)):
        for name, tensor in layer_modules(student)[m].state_dict().items():
            want = (source[g - 1] if g else layer_modules(fresh)[m]).state_dict()[name]
            assert torch.equal(tensor, want), (m, name)
    theirs = teacher.state_dict()
    outside = [n for n in student.state_dict() if "layer." not in n and "layers." not in n]
    assert len(outside) >= 2
    assert all(torch.equal(student.state_dict()[n], theirs[n]) for n in outside)
    assert not torch.equal(fresh.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_init_mapping_follows_the_hidden_mapping(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    student = build(StudentConfig(layers=2, init="mapping"), path, mapping=LayerMapping((0, 3), 4))
    got, want = layer_modules(student)[1].state_dict(), layer_modules(tiny_model("bert"))[2].state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_albert_copies_its_groups(tmp_path: Path) -> None:
    path = save_tiny("albert", tmp_path)
    student = build(StudentConfig(layers=2, init="every-other"), path)
    theirs = tiny_model("albert").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.state_dict().items())
    config = AlbertConfig.from_dict({**tiny_config("albert").to_dict(), "num_hidden_groups": 2})
    grouped = new_model(config, with_mlm_head=False, seed=0)
    same = new_model(build_student_config(StudentConfig(layers=2), config), with_mlm_head=False, seed=1)
    copy_from_teacher(same, grouped, (1, 4))
    assert all(torch.equal(tensor, grouped.state_dict()[name]) for name, tensor in same.state_dict().items())
    short = new_model(build_student_config(StudentConfig(layers=1), config), with_mlm_head=False, seed=0)
    with pytest.raises(UserError, match=r"student.init: the student has 1 groups of shared layers and the teacher 2"):
        copy_from_teacher(short, grouped, (1,))


@pytest.mark.parametrize("family", NARROWABLE)
@pytest.mark.parametrize("mlm", [False, True])
@pytest.mark.parametrize(("hidden", "heads", "ffn"), [(24, 4, 32), (24, 2, 50), (20, 2, 20), (48, 4, 33)])
def test_narrower_student_takes_consistent_units(
    family: str, mlm: bool, hidden: int, heads: int, ffn: int, tmp_path: Path
) -> None:
    path = save_tiny(family, tmp_path, mlm=mlm)
    cfg = StudentConfig(layers=2, hidden_size=hidden, heads=heads, intermediate_size=ffn, init="2-4")
    student, teacher = build(cfg, path, mlm=mlm), tiny_model(family, mlm=mlm)
    small, big = student.base_model.state_dict(), teacher.base_model.state_dict()
    D, F = evenly_spaced(hidden, 48), evenly_spaced(ffn, 64)
    A = torch.cat([12 * h + evenly_spaced(hidden // heads, 12) for h in evenly_spaced(heads, 4)])
    distil = family == "distilbert"
    to, old = ("transformer.layer.1.", "transformer.layer.3.") if distil else ("encoder.layer.1.", "encoder.layer.3.")
    query, out = {
        "distilbert": ("attention.q_lin", "attention.out_lin"),
        "mpnet": ("attention.attn.q", "attention.attn.o"),
    }.get(family, ("attention.self.query", "attention.output.dense"))
    up, down = ("ffn.lin1", "ffn.lin2") if distil else ("intermediate.dense", "output.dense")
    norm = "output_layer_norm" if distil else "output.LayerNorm"
    for name, rows, columns in ((query, A, D), (out, D, A), (up, F, D), (down, D, F)):
        want = big[f"{old}{name}.weight"][rows][:, columns]
        assert torch.equal(small[f"{to}{name}.weight"], want), name
        assert torch.equal(small[f"{to}{name}.bias"], big[f"{old}{name}.bias"][rows]), name
    assert torch.equal(small[f"{to}{norm}.weight"], big[f"{old}{norm}.weight"][D])
    E = torch.arange(16) if family == "electra" else D
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(small[words], big[words][:, E])
    assert torch.equal(small["embeddings.LayerNorm.bias"], big["embeddings.LayerNorm.bias"][E])
    if family == "mpnet":
        bias = "encoder.relative_attention_bias.weight"
        assert torch.equal(small[bias], big[bias][:, evenly_spaced(heads, 4)])
    if family == "electra":
        assert torch.equal(small["embeddings_project.weight"], big["embeddings_project.weight"][D])
    if mlm:
        decoder = student.get_output_embeddings()
        assert torch.equal(decoder.weight, student.get_input_embeddings().weight)
        assert torch.equal(decoder.bias, teacher.get_output_embeddings().bias)
    fresh = build_student(
        StudentConfig(layers=2, hidden_size=hidden, heads=heads, intermediate_size=ffn),
        SavedModel.read("teacher.path", path), None, None, mlm, 0, "sdpa",
    )  # fmt: skip
    untouched = [n for n, p in student.named_parameters() if torch.equal(p, fresh.get_parameter(n))]
    assert untouched == [], "every tensor must come from the teacher"


@pytest.mark.parametrize("family", ["albert", "modernbert", "deberta-v2"])
def test_other_families_cannot_be_narrowed(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    with pytest.raises(UserError, match=rf"student.init: .*{family}.*student.init=random or keep"):
        build(StudentConfig(layers=2, hidden_size=24, heads=4, init="first"), path)
    build(StudentConfig(layers=2, hidden_size=24, heads=4), path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 96}, r"hidden_size=96 and the teacher 48"),
        ({"heads": 8}, r"heads=8 and the teacher 4"),
        ({"heads": 2}, r"hidden_size/heads=24 and the teacher 12"),
        ({"intermediate_size": 65}, r"intermediate_size=65 and the teacher 64"),
    ],
)
def test_wider_student_is_refused(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    with pytest.raises(UserError, match=rf"student.init: .*{message}.*student.init=random"):
        build(StudentConfig(layers=2, init="first", **sizes), path)
    build(StudentConfig(layers=2, **sizes), path)


def test_electra_without_its_projection_is_refused(tmp_path: Path) -> None:
    path = save_tiny("electra", tmp_path)
    with pytest.raises(UserError, match=r"student.init: with hidden_size=16 the student has no projection"):
        build(StudentConfig(layers=2, hidden_size=16, heads=4, init="1-2"), path)
    build(StudentConfig(layers=2, hidden_size=16, heads=4), path)


@pytest.mark.parametrize("same", [True, False])
def test_a_file_with_an_output_matrix_beside_tied_embeddings(same: bool, tmp_path: Path) -> None:
    """A model read from it has both, and says so, or its export would have one in place of the other."""
    path = save_tiny("bert", tmp_path, mlm=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    output = embeddings.clone() if same else torch.randn_like(embeddings)
    save_file(tensors | {"cls.predictions.decoder.weight": output}, file, {"format": "pt"})
    read = build(StudentConfig(path=path), path, mlm=True)
    assert read.config.tie_word_embeddings is same
    assert torch.equal(read.get_output_embeddings().weight, output)
    assert torch.equal(read.get_input_embeddings().weight, embeddings)
    copied = build(StudentConfig(init="1-2"), path, mlm=True)
    assert torch.equal(copied.get_input_embeddings().weight, embeddings)


def test_narrow_copy_is_closer_to_the_teacher_than_chance(tmp_path: Path) -> None:
    """The kept units of the embeddings still correlate with the teacher's own."""
    path = save_tiny("bert", tmp_path)
    student = build(StudentConfig(layers=2, hidden_size=24, heads=4, init="1-2"), path).eval()
    teacher = tiny_model("bert")
    install(teacher, "sdpa")
    with torch.no_grad():
        got, want = (capture(m, make_batch(), Wanted(hidden=frozenset({0}))).hidden[0] for m in (student, teacher))
    pairs = torch.stack([got.flatten(), want[..., evenly_spaced(24, 48)].flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.9
