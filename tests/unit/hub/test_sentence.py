"""Folders of sentence-transformers: what is read of them, and what of it a student has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentence_folder import MEAN, NEW, OLD, surround, write_json
from tiny_world import save_tiny_teacher

from engine.errors import UserError
from engine.hub.sentence import SentenceEncoder, encoder_folder, read_sentence_encoder
from engine.hub.tokenizer import load_tokenizer
from engine.models.hub import SavedModel, load_backbone


def read(folder: Path) -> SentenceEncoder:
    encoder, reason = read_sentence_encoder(str(folder), "teacher.path")
    assert encoder is not None, reason
    assert reason == ""
    return encoder


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_max_tokens": True}, ("max",)),
        ({"pooling_mode_mean_tokens": True}, ("mean",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len_tokens",)),
        ({"pooling_mode_weightedmean_tokens": True}, ("weightedmean",)),
        ({"pooling_mode_lasttoken": True}, ("lasttoken",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_mean_tokens": False}, ("mean",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
    ],
)
def test_ways_of_pooling_by_old_and_new_names(settings: dict[str, Any], ways: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("word_embedding_dimension", "embedding_dimension"):
        assert read(surround(tmp_path, pooling={name: 32, **settings})).pooling == ways


@pytest.mark.parametrize("library", [OLD, NEW])
def test_what_a_folder_says(library: str, tmp_path: Path) -> None:
    settings = {
        "prompts": {"query": "query: ", "document": ""},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    }
    reading = {"max_seq_length": 20, "do_lower_case": True}
    kinds = ["Pooling", "Dense", "Normalize"]
    encoder = read(surround(tmp_path, kinds, reading=reading, settings=settings, library=library))
    assert encoder.is_normalized
    assert encoder.lower_case
    assert (encoder.max_seq_length, encoder.similarity, encoder.default_prompt) == (20, "dot", "query")
    assert encoder.prompts == {"query": "query: "}
    assert [layer.weights for layer in encoder.dense] == [tmp_path / "2_Dense" / "model.safetensors"]
    assert str(encoder) == "mean pooling, a dense layer to width 24, normalised, 20 tokens at most, prompts query"


def test_what_a_folder_leaves_out(tmp_path: Path) -> None:
    encoder = read(surround(tmp_path, ["Pooling"]))
    assert not encoder.is_normalized
    assert not encoder.lower_case
    assert (encoder.max_seq_length, encoder.similarity, encoder.default_prompt, encoder.prompts) == (
        None, "cosine", None, {},
    )  # fmt: skip
    assert str(encoder) == "mean pooling"


def test_an_encoder_in_a_folder_of_its_own(tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "0_Transformer")
    surround(tmp_path, encoder="0_Transformer", reading={"max_seq_length": 30})
    path = str(tmp_path)
    teacher = SavedModel.read("teacher.path", path)
    assert teacher.path == encoder_folder(path, "teacher.path") == f"{path}/0_Transformer"
    assert load_backbone(teacher.path, key=teacher.key, config=teacher.config).config.hidden_size == 32
    assert load_tokenizer(path, "tokenizer").tokenize("small model") == ["small", "model"]
    assert read(tmp_path).max_seq_length == 30
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").rename(
        tmp_path / "0_Transformer" / "sentence_roberta_config.json"
    )
    assert read(tmp_path).max_seq_length == 30


def test_other_folders_are_where_they_are(tmp_path: Path) -> None:
    assert encoder_folder(f"{tmp_path}/", "teacher.path") == f"{tmp_path}/"
    assert read_sentence_encoder(str(tmp_path), "teacher.path") == (None, "")
    assert encoder_folder(str(surround(tmp_path)), "teacher.path") == str(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "change", "reason"),
    [
        (["Pooling", "LSTM"], {}, "its modules are Transformer, Pooling, LSTM; only a Transformer, a Pooling, then"),
        (["Dense", "Pooling"], {}, "its modules are Transformer, Dense, Pooling; "),
        ([], {}, "its modules are Transformer; "),
        (["Pooling"], {"modules.json": []}, "its modules are none; "),
        (["Pooling"], {"modules.json": [{"type": "own_code.Transformer", "path": ""}]}, "are own_code.Transformer; "),
        (["Pooling"], {"1_Pooling/config.json": None}, "1_Pooling/config.json is not there; copy it"),
        (["Pooling", "Dense"], {"2_Dense/config.json": None}, "2_Dense/config.json is not there"),
        (["Pooling", "Dense"], {"2_Dense/model.safetensors": None}, "2_Dense/model.safetensors is not there; Sentence"),
        (["Pooling"], {"1_Pooling/config.json": {"pooling_mode": "mean"}}, "1_Pooling/config.json has no width"),
        (["Pooling"], {"1_Pooling/config.json": MEAN | {"pooling_mode": "rms"}}, "config.json has pooling 'rms'"),
    ],
)
def test_what_is_not_understood_has_a_reason(
    kinds: list[str], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    surround(tmp_path, kinds)
    for name, values in change.items():
        (tmp_path / name).unlink()
        if values is not None:
            write_json(tmp_path / name, values)
    encoder, found = read_sentence_encoder(str(tmp_path), "teacher.path")
    assert encoder is None
    assert reason in found


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("modules.json", "version https://git-lfs.github.com/spec/v1\n", "modules.json is torn"),
        ("modules.json", "{}", "modules.json holds a dict, not a list"),
        ("modules.json", '[{"path": ""}]', "modules.json has an entry without type or path"),
        ("modules.json", '[{"type": "x", "path": "../other"}]', r"names '\.\./other', which is outside of its folder"),
        ("modules.json", '[{"type": "x", "path": "/etc"}]', "names '/etc', which is outside of its folder"),
        ("1_Pooling/config.json", "version https://git-lfs.github.com/spec/v1\n", "config.json is a git-lfs pointer"),
        ("2_Dense/model.safetensors", "x", "model.safetensors is cut"),
        ("sentence_bert_config.json", "[]", "sentence_bert_config.json holds a list"),
        ("config_sentence_transformers.json", "{", "config_sentence_transformers.json is torn"),
    ],
)
def test_files_that_are_not_whole_are_refused(name: str, content: str, error: str, tmp_path: Path) -> None:
    surround(tmp_path, ["Pooling", "Dense"], reading={}, settings={})
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^teacher.path: .*{error}"):
        read_sentence_encoder(str(tmp_path), "teacher.path")


def test_a_student_reads_as_much_as_it_has_positions_for(tmp_path: Path) -> None:
    encoder = read(surround(tmp_path, reading={"max_seq_length": 20, "do_lower_case": False}))
    for longest, kept in ((None, 20), (64, 20), (16, 16)):
        assert encoder.for_student(32, longest).reading == {"max_seq_length": kept, "do_lower_case": False}
    assert read(surround(tmp_path, reading={"max_seq_length": None})).for_student(32, 16).max_seq_length is None


@pytest.mark.parametrize(("width", "kinds"), [(32, ["Pooling", "Dense", "Normalize"]), (16, ["Pooling", "Normalize"])])
def test_a_student_has_dense_layers_where_the_widths_agree(width: int, kinds: list[str], tmp_path: Path) -> None:
    encoder = read(surround(tmp_path / "teacher", ["Pooling", "Dense", "Normalize"], encoder="0_Transformer"))
    encoder.for_student(width, None).write(tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    student = read(tmp_path / "student")
    assert [module.folder for module in student.modules] == [f"{i}_{kind}" for i, kind in enumerate(kinds, start=1)]
    assert student.encoder.folder == ""
    assert student.modules[0].settings == MEAN | {"word_embedding_dimension": width}
    entries = json.loads((tmp_path / "student" / "modules.json").read_text())
    assert [(entry["idx"], entry["name"]) for entry in entries] == [(i, str(i)) for i in range(len(kinds) + 1)]
