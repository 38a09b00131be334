"""What an export holds beside the weights, and what it must not say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_folder import surround
from tiny_encoders import tiny_model
from tiny_world import save_tiny_teacher
from transformers import AutoModel, AutoTokenizer, BertModel

from engine.hub.sentence import read_sentence_encoder
from engine.hub.tokenizer import load_tokenizer
from engine.records.history import History
from engine.train.export import is_export, write_model
from engine.train.portable import OF_THIS_MACHINE, licences_of, public_name

TEXTS = ["The small model learns.", "not much [MASK] today, " * 30, "unknown ☃ words"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A tokenizer with settings of its own, beside the files of sentence-transformers and a card."""
    folder = tmp_path / "home" / "teacher"
    save_tiny_teacher(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["☃"])
    tokenizer.backend_tokenizer.enable_truncation(max_length=20)
    tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=20)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder)
    surround(folder, reading={"max_seq_length": 256, "do_lower_case": False})
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- x\n---\n# A teacher\n")
    return folder


def export(teacher: Path, target: Path, family: str = "bert") -> Path:
    run_dir = target.parent / "run"
    load_tokenizer(str(teacher), "teacher.path").save_pretrained(run_dir / "tokenizer")
    sentence, _ = read_sentence_encoder(str(teacher), "teacher.path")
    assert sentence is not None
    sentence.write(run_dir / "tokenizer")
    licences = licences_of(str(teacher))
    card = {"teacher": public_name(str(teacher)), "licence of the teacher": ", ".join(licences)}
    model = tiny_model(family)
    model.config._name_or_path = str(teacher)
    model.config.auto_map = {"AutoModel": "modeling_own.OwnModel"}
    description = {"card": card, "licences": licences, "base_model": "teacher", "head": "none", "step": 7}
    write_model(model, description, {}, run_dir / "tokenizer", target, history=History())
    return target


def test_no_file_says_where_it_was_made(tmp_path: Path, teacher: Path) -> None:
    files = [path for path in export(teacher, tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert not [key for key in OF_THIS_MACHINE if path.suffix == ".json" and f'"{key}"'.encode() in content]
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text(), "its files are not there"
    assert (
        "| teacher | teacher |\n| licence of the teacher | apache-2.0 |" in (tmp_path / "out" / "README.md").read_text()
    )


def test_all_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path, teacher: Path) -> None:
    before = os.umask(0o027)
    try:
        out = export(teacher, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir() if path.is_file()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}


def test_the_tokenizer_does_what_the_teachers_does(tmp_path: Path, teacher: Path) -> None:
    out = export(teacher, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (teacher, out))
    assert before(TEXTS).input_ids == after(TEXTS).input_ids
    assert (
        before(TEXTS, truncation=True, max_length=9).input_ids == after(TEXTS, truncation=True, max_length=9).input_ids
    )
    states = [json.loads((folder / "tokenizer.json").read_text()) for folder in (teacher, out)]
    assert states[0] == states[1]
    assert (states[1]["truncation"]["max_length"], states[1]["padding"]["strategy"]) == (20, {"Fixed": 20})
    assert after.model_max_length == 40, "what the model has positions for"


def test_positions_of_roberta_begin_behind_the_pad(tmp_path: Path, teacher: Path) -> None:
    out = export(teacher, tmp_path / "out", "roberta")
    assert AutoTokenizer.from_pretrained(out).model_max_length == 38


def test_its_class_is_one_that_transformers_4_knows(tmp_path: Path, teacher: Path) -> None:
    settings = json.loads((export(teacher, tmp_path / "out") / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_weights_are_those_of_the_model(tmp_path: Path, teacher: Path) -> None:
    loaded = AutoModel.from_pretrained(export(teacher, tmp_path / "out"), add_pooling_layer=False)
    assert isinstance(loaded, BertModel)
    want = tiny_model("bert").state_dict()
    assert all(torch.equal(want[name], tensor) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\r\nlanguage: en\r\nlicense: mit\r\n---\r\n# A\n", ["mit"]),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", ["mit", "apache-2.0"]),
        ("---\nlanguage: en\n---\n# A\nlicense: of something else\n", []),
        ("---\nlicense: [\n---\n", []),
        ("# A model\n", []),
    ],
)
def test_the_licence_is_that_of_the_cards_front_matter(card: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert licences_of(str(tmp_path)) == found


def test_a_clone_of_a_repository_with_an_export_is_not_replaced(tmp_path: Path, teacher: Path) -> None:
    out = export(teacher, tmp_path / "out")
    assert is_export(out)
    (out / ".git").mkdir()
    assert not is_export(out)


def test_hub_names_stay_and_folders_lose_their_place(tmp_path: Path) -> None:
    assert public_name("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert public_name(str(tmp_path / "gone")) == "gone"
    assert public_name(str(tmp_path / "models--org--a-name" / "snapshots" / "0123abc")) == "org/a-name"
    assert licences_of(str(tmp_path)) == []
