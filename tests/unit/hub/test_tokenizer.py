"""Tokenizers that cannot be read, or have no fast version."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_world import save_tiny_teacher

from engine.errors import UserError
from engine.hub.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_teacher(tmp_path)
    return tmp_path


def test_a_fast_one_is_read(folder: Path) -> None:
    assert load_tokenizer(str(folder), "tokenizer").tokenize("the small model") == ["the", "small", "model"]


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("BertJapaneseTokenizer", {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"}),
        ("BertweetTokenizer", {"vocab.txt": "a 1\nb 2\n", "bpe.codes": "a b 1\n"}),
    ],
)
def test_one_without_a_fast_version_is_refused_before_it_asks_for_packages(
    kind: str, files: dict[str, str], folder: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "word_tokenizer_type": "mecab"}))
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"tokenizer=.*{kind} has no fast version"):
        load_tokenizer(str(folder), "tokenizer")


def test_one_that_is_json_but_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer=.*cannot read the tokenizer in this folder"):
        load_tokenizer(str(folder), "tokenizer")


def test_a_folder_without_a_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer="):
        load_tokenizer(str(folder), "tokenizer")


def test_a_sentencepiece_model_names_the_package_that_reads_it(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    (folder / "sentencepiece.bpe.model").write_bytes(b"torn")
    said = "torn, or no SentencePiece model" if find_spec("sentencepiece") else "pip install sentencepiece"
    with pytest.raises(UserError, match=rf"tokenizer: .*sentencepiece.bpe.model is .*{said}"):
        load_tokenizer(str(folder), "tokenizer")
