"""The model card: what the hub reads of it, what it says, and that its Python runs in the folder of the export."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_folder import surround
from tiny_world import save_tiny_teacher
from transformers import AutoConfig, AutoTokenizer

from engine.models.hub import Head, init_arguments, model_class
from engine.records.comparison import Comparison, MeasuredEncoder
from engine.records.history import History
from engine.records.records import format_record
from engine.train.card import is_card, last_comparison
from engine.train.export import write_model

STEPS = [
    {"step": 0, "held_out": {"total": 3.0, "terms": {"hidden/1-2": 3.0}}},
    {"step": 2, "total": 2.5, "losses": {"hidden": 2.25, "old": 0.25}},
    {"step": 4, "total": None, "losses": {"hidden": 1.125, "new": 0.5}},
    {"step": 4, "held_out": {"total": 1.5, "terms": {"hidden/1-2": 1.5}}},
]
SPEED = {"tokens": 700, "seconds": 35.0, "peak_memory_gib": 1.25}
ENCODER = MeasuredEncoder(
    name="teacher",
    parameters=2000,
    parameters_beside_embeddings=1000,
    disk_mib=8.0,
    memory_mib=8.0,
    ms=[4.0],
    speedup=[(1.0, 1.0, 1.0)],
)
COMPARISON = Comparison(
    encoders=[ENCODER], batch_sizes=[1], seq_len=16, dtype="float32", rounds=[3], machine="a processor; torch 2"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "teacher"
    save_tiny_teacher(folder)
    return folder


def export(
    teacher: Path,
    target: Path,
    head: Head = "none",
    *,
    config: dict[str, Any] | None = None,
    history: History | None = None,
    comparison: Comparison | None = None,
    **description: Any,
) -> Path:
    """An export with the tiny teacher's tokenizer, and what else lies in the folder `tokenizer` beside it."""
    AutoTokenizer.from_pretrained(teacher).save_pretrained(target.parent / "tokenizer")
    sizes = AutoConfig.from_pretrained(teacher, **(config or {}))
    torch.manual_seed(0)
    model = model_class(sizes, head)(sizes, **init_arguments(sizes, head)).eval()
    whole = {"card": {"teacher": "a|b"}, "head": head, "step": 4, **description}
    tokenizer = target.parent / "tokenizer"
    write_model(model, whole, {}, tokenizer, target, history=history or History(), comparison=comparison)
    return target


def run_usage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's Python has set at its end, in the folder."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(code, names)
    return names


def test_the_states_of_an_encoder(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_usage(export(teacher, tmp_path / "out"), monkeypatch)
    out = capsys.readouterr()
    assert re.fullmatch(r"torch.Size\(\[2, \d+, 32\]\)\n", out.out)
    assert "newly initialized" not in out.err, "no random pooler"


@pytest.mark.parametrize("head", ["none", "mlm"])
def test_the_vectors_of_a_sentence_encoder(
    head: Head, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surround(tmp_path / "tokenizer")
    out = export(teacher, tmp_path / "out", head)
    data = ModelCard.load(out / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    names = run_usage(out, monkeypatch)
    assert names["vectors"].shape == (2, 32)
    assert capsys.readouterr().out.startswith("tensor([[1.0000, ")


def test_a_word_for_a_mask(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_usage(export(teacher, tmp_path / "out", "mlm"), monkeypatch)
    [at] = (names["batch"]["input_ids"][0] == names["tokenizer"].mask_token_id).nonzero().flatten().tolist()
    best = names["logits"][0, at].argmax().item()
    assert capsys.readouterr().out == names["tokenizer"].decode([best]) + "\n"


@pytest.mark.parametrize("pairs", [True, False])
def test_a_label_of_a_classifier(
    pairs: bool, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}}
    names = run_usage(export(teacher, tmp_path / "out", "classification", config=labels, pairs=pairs), monkeypatch)
    assert (names["batch"]["input_ids"][0] == 3).sum() == 1 + pairs, "separators"
    assert capsys.readouterr().out == labels["id2label"][names["logits"].argmax().item()] + "\n"


def test_a_number_of_a_regression(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_labels": 1, "problem_type": "regression"}
    names = run_usage(export(teacher, tmp_path / "out", "classification", config=settings, pairs=True), monkeypatch)
    assert float(capsys.readouterr().out) == pytest.approx(names["logits"].item())


def test_an_answer_to_a_question(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_usage(export(teacher, tmp_path / "out", "span"), monkeypatch)
    answer = names["batch"]["input_ids"][0, names["start"] : names["end"] + 1]
    assert capsys.readouterr().out == names["tokenizer"].decode(answer) + "\n"


@pytest.mark.parametrize(
    ("head", "pipeline", "tags"),
    [
        ("none", "feature-extraction", ["knowledge-distillation", "mapdistill"]),
        ("mlm", "fill-mask", ["knowledge-distillation", "mapdistill"]),
        ("classification", "text-classification", ["mapdistill"]),
        ("span", "question-answering", ["mapdistill"]),
    ],
)
def test_the_hub_reads_the_front_matter(
    head: Head, pipeline: str, tags: list[str], teacher: Path, tmp_path: Path
) -> None:
    out = export(teacher, tmp_path / "out", head, licences=["mit"], base_model="org/teacher")
    assert ModelCard.load(out / "README.md").data.to_dict() == {
        "base_model": "org/teacher",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": pipeline,
        "tags": tags,
    }


@pytest.mark.parametrize(
    ("given", "license", "base_model"),
    [
        ({}, None, None),  # checkpoints of earlier versions
        ({"licences": [], "base_model": None}, None, None),
        ({"licences": ["mit", "apache-2.0"], "base_model": "a"}, ["mit", "apache-2.0"], "a"),
    ],
)
def test_what_is_not_known_is_left_out(
    given: dict[str, Any], license: str | list[str] | None, base_model: str | None, teacher: Path, tmp_path: Path
) -> None:
    data = ModelCard.load(export(teacher, tmp_path / "out", **given) / "README.md").data.to_dict()
    assert (data.get("license"), data.get("base_model")) == (license, base_model)


def test_losses_time_and_speed_are_told(teacher: Path, tmp_path: Path) -> None:
    """A loss that was not finite is None in the records; one that came later has no first value."""
    history = History()
    for record in STEPS:
        history.add(record if "held_out" in record else record | SPEED)
    text = (export(teacher, tmp_path / "out", history=history, comparison=COMPARISON) / "README.md").read_text()
    for line in (
        "| optimizer step | 4 |",
        "| teacher | a\\|b |",
        "| time of training | 1 min 10 s, 20 tokens/s, peak memory 1.25 GiB |",
        "| total | 2.5 (step 2) | not finite (step 4) |",
        "| hidden | 2.25 (step 2) | 1.125 (step 4) |",
        "| held out, total | 3 (step 0) | 1.5 (step 4) |",
        "| parameters | 2,000 |",
        "float32 forward passes over 1 x 16 tokens in turns, medians of 3 rounds; a processor; torch 2",
    ):
        assert f"\n{line}\n" in text
    assert "| new |" not in text


def test_without_history_comparison_and_tokenizer_there_are_no_empty_sections(teacher: Path, tmp_path: Path) -> None:
    sizes = AutoConfig.from_pretrained(teacher)
    model = model_class(sizes, "none")(sizes)
    description = {"card": {}, "head": "none", "step": 0}
    write_model(model, description, {}, tmp_path / "none", tmp_path / "out", history=History())
    text = (tmp_path / "out" / "README.md").read_text()
    assert re.findall("^## (.*)$", text, flags=re.MULTILINE) == ["How it was made"]
    assert is_card(text)
    assert not is_card("# A model\n")


def test_the_last_result_that_was_compared_counts(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    assert last_comparison(records) is None
    lines = [format_record("result", status="done"), format_record("result", status="done", comparison=None)]
    records.write_text("\n".join(lines))
    assert last_comparison(records) is None
    lines.insert(1, format_record("result", comparison=asdict(COMPARISON)))
    records.write_text("\n".join(lines))
    found = last_comparison(records)
    assert found is not None
    assert found.rows() == COMPARISON.rows()
