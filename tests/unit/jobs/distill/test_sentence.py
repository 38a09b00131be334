"""A sentence encoder teaches, and its student is one: in sentence-transformers, as in training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from sentence_folder import surround
from tiny_world import TinyWorld, write_text
from torch.nn.functional import normalize
from transformers import AutoModel

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.config.tools import PrepareConfig, SourceConfig
from engine.data.batch import Batch, Counts
from engine.data.prepare.corpus import prepare
from engine.jobs.distill.build import build_module
from engine.jobs.distill.plan import Plan, describe_for_export, make_plan
from engine.jobs.distill.vectors import HeldOutVectors, Room
from engine.models.features import Features
from engine.models.projections import Projections
from engine.records.history import History
from engine.records.run_dir import RunDir
from engine.train.export import rebuild_student, write_model

TEXTS = ["The small model learns.", "one", "not much else today, and a large teacher " * 4]


def positions(mask: torch.Tensor) -> torch.Tensor:
    return mask * torch.arange(1, mask.shape[1] + 1)


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "cls": lambda states, mask: states[:, 0],
    "lasttoken": lambda states, mask: states[torch.arange(len(mask)), mask.sum(1) - 1],
    "max": lambda states, mask: states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1),
    "mean_sqrt_len_tokens": lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).sqrt(),
    "weightedmean": lambda states, mask: (
        (states * positions(mask)[..., None]).sum(1) / positions(mask).sum(1, keepdim=True)
    ),
}
"""Vectors (B, D) of states (B, T, D) and an attention mask (B, T), by what the literature calls them."""


STATES = ["--loss.pooled", "0"]
TRAINED = ["--loss.pooled", "1", "--loss.projection", "shared", "--loss.projection_bias", "true"]
"""Vectors are trained through a map, at equal widths too."""


@pytest.fixture
def teacher(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_world.teacher, tmp_path / "teacher")


def plan_of(world: TinyWorld, teacher: Path, *argv: str) -> Plan:
    usual = ["--config", str(ROOT / "examples" / "quickstart.yaml"), "--student.layers", "2", *STATES]
    paths = ["--teacher.path", str(teacher), "--data.path", str(world.corpus)]
    return make_plan(parse_config(RunConfig, [*usual, *paths, "--student.hidden_size", "16", *argv], "test"))


def export(plan: Plan, folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor, Projections]:
    """Returns the export of an untrained student, its last hidden states in training of TEXTS with their mask, and its
    projections."""
    run_dir = RunDir(folder / "run")
    beside = None if plan.sentence is None else plan.sentence.write
    run_dir.write_settings(plan.config, tokenizer=plan.tokenizer, beside_tokenizer=beside)
    module = build_module(plan, torch.device("cpu"))[0]
    student, projections = module.student.eval(), module.projections
    description = describe_for_export(plan, student.config) | {"step": 0}
    model = rebuild_student(description, student.state_dict())
    write_model(model, description, projections.state_dict(), run_dir.tokenizer, folder / "student", history=History())
    batch = plan.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = student.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return folder / "student", states, batch["attention_mask"], projections


@pytest.mark.parametrize("settings", [STATES, TRAINED], ids=["states", "vectors"])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(
    ("ways", "others"),
    [*(((way,), ["Normalize"]) for way in POOLINGS), (("cls", "max"), []), (("mean",), ["Dense", "Normalize"])],
    ids=[*POOLINGS, "two ways", "dense"],
)
def test_vectors_are_those_of_training(
    ways: Sequence[str],
    others: list[str],
    width: int,
    settings: list[str],
    tiny_world: TinyWorld,
    teacher: Path,
    tmp_path: Path,
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    pooling = {"embedding_dimension": 32, "pooling_mode": ways[0] if len(ways) == 1 else list(ways)}
    surround(teacher, ["Pooling", *others], pooling=pooling, reading={"max_seq_length": 64})
    head = ["--loss.mlm", "1", "--data.mlm_probability", "0.2"] if "max" in ways else []
    plan = plan_of(tiny_world, teacher, "--student.hidden_size", str(width), *head, *settings)
    folder, states, mask, projections = export(plan, tmp_path)
    vectors = [POOLINGS[way](states, mask) for way in ways]
    if settings == TRAINED:
        vectors = [projections(2, vector).detach() for vector in vectors]
    want = torch.cat(vectors, dim=-1)
    if "Dense" in others and (width == 32 or settings == TRAINED):
        dense = load_file(teacher / "2_Dense" / "model.safetensors")
        want = torch.tanh(want @ dense["linear.weight"].T + dense["linear.bias"])
    want = normalize(want) if "Normalize" in others else want
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), want, rtol=0, atol=1e-5)
    assert AutoModel.from_pretrained(folder, add_pooling_layer=False).config.hidden_size == width
    is_missing = "Dense" in others and width == 16 and settings == STATES
    assert [bool(note) for note in plan.warnings if "dense" in note] == [True] * is_missing


@pytest.mark.parametrize("ways", [["mean"], ["cls", "max"]], ids=["one way", "two ways"])
@pytest.mark.parametrize("unpadded", [True, False])
def test_held_out_vectors_go_through_the_map(
    ways: list[str], unpadded: bool, tiny_world: TinyWorld, teacher: Path
) -> None:
    """A large bias makes the vectors of an export alike, not the states before it."""
    surround(teacher, pooling={"embedding_dimension": 32, "pooling_mode": ways})
    head = ["--loss.mlm", "1", "--data.mlm_probability", "0.2"] if "max" in ways else []
    plan = plan_of(tiny_world, teacher, *TRAINED, *head)
    module = build_module(plan, torch.device("cpu"))[0].eval()
    module.unpadded = unpadded
    linear = module.projections.linears["layers"]
    assert isinstance(linear, torch.nn.Linear)
    texts = plan.tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = texts["input_ids"], texts["attention_mask"]
    batch = Batch(ids, mask, None, Counts(), lengths=tuple(mask.sum(1).tolist()))
    with torch.no_grad():
        linear.bias.fill_(50.0)
        states = module.student.base_model(ids, attention_mask=mask).last_hidden_state
        want = torch.cat([linear(POOLINGS[way](states, mask)) for way in ways], dim=1)
        of_teacher = torch.randn(len(TEXTS), ids.shape[1], 32)
        held_out = HeldOutVectors(2, 4, plan.pooling)
        held_out.add(module, batch, Features(hidden={4: of_teacher}))
    rooms = held_out.rooms()
    assert rooms is not None
    student, of_the_teacher = rooms
    assert (student.cosine, student.rank) == pytest.approx((Room.of(want).cosine, Room.of(want).rank), rel=1e-4)
    assert student.cosine > 0.9
    target = torch.cat([POOLINGS[way](of_teacher, mask) for way in ways], dim=1)
    assert of_the_teacher.cosine == pytest.approx(Room.of(target).cosine, rel=1e-4)


@pytest.mark.parametrize("encoder", ["", "0_Transformer"])
def test_the_library_reads_what_is_read_here(encoder: str, tiny_world: TinyWorld, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    teacher, made = tmp_path / "teacher", tmp_path / "by the library"
    shutil.copytree(tiny_world.teacher, teacher / encoder)
    settings = {"prompts": {"query": "the "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    surround(teacher, encoder=encoder, reading={"max_seq_length": 20, "do_lower_case": False}, settings=settings)
    model = sentence_transformers.SentenceTransformer(str(teacher), device="cpu")
    model.save_pretrained(str(made))
    for folder in (teacher, made):
        plan = plan_of(tiny_world, folder)
        sentence = plan.sentence
        assert sentence is not None
        assert sentence.pooling == (model[1].pooling_mode,)
        assert sentence.prompts == {name: text for name, text in model.prompts.items() if text}
        assert (sentence.default_prompt, sentence.similarity) == (model.default_prompt_name, model.similarity_fn_name)
        assert (sentence.max_seq_length or plan.tokenizer.model_max_length) == model.max_seq_length == 20
        assert plan.warnings == ()


@pytest.mark.parametrize(
    ("kinds", "warning"),
    [
        (["Pooling", "LSTM"], "the student will be no sentence encoder: its modules are Transformer, Pooling, LSTM"),
        (["Pooling", "Dense"], "takes its own width, not the student's 16: the student's vectors are its pooled"),
    ],
)
def test_what_the_student_will_lack_is_said(
    kinds: list[str], warning: str, tiny_world: TinyWorld, teacher: Path
) -> None:
    plan = plan_of(tiny_world, surround(teacher, kinds))
    [said] = plan.warnings
    assert warning in said


@pytest.mark.parametrize("lowers", [True, False])
def test_capitals_that_the_teacher_never_meets_are_said(lowers: bool, teacher: Path, tmp_path: Path) -> None:
    surround(teacher, reading={"do_lower_case": lowers})
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))
    world = TinyWorld(teacher, tmp_path / "corpus", tmp_path / "text.txt")
    write_text(world.text, 60)
    source = SourceConfig(path=str(world.text))
    prepare(
        PrepareConfig(sources=[source], output_dir=str(world.corpus), tokenizer=str(teacher), seq_len=16, workers=1)
    )
    notes = [note for note in plan_of(world, teacher, "--data.eval_sequences", "0").warnings if "do_lower_case" in note]
    assert len(notes) == lowers


def test_the_card_is_that_of_a_sentence_encoder(tiny_world: TinyWorld, teacher: Path, tmp_path: Path) -> None:
    surround(teacher, reading={"max_seq_length": 20}, settings={"prompts": {"query": "the "}})
    folder, *_ = export(plan_of(tiny_world, teacher), tmp_path)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity\n" in card
    assert "library_name: sentence-transformers\n" in card
    assert "| vector of a text | mean pooling, normalised, 20 tokens at most, prompts query |" in card
