"""Tokenizers that cannot be read, or have no fast version."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_world import save_tiny_teacher

from engine.errors import UserError
from engine.hub.tokenizer import load_tokenizer, reading_difference


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
    for _ in range(2):
        with pytest.raises(UserError, match=r"tokenizer=.*no vocabulary there; add the tokenizer's files"):
            load_tokenizer(str(folder), "tokenizer")
        (folder / "tokenizer_config.json").unlink(missing_ok=True)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_slow_class_beside_a_file_of_a_fast_one(folder: Path) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    with pytest.raises(UserError, match="BertJapaneseTokenizer has no fast version"):
        load_tokenizer(str(folder), "tokenizer")
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizer")
    assert load_tokenizer(str(folder), "tokenizer").is_fast


def test_a_vocabulary_without_the_unknown_token(folder: Path) -> None:
    """The first unknown word would end the run."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*Missing \[UNK\] token"):
        load_tokenizer(str(folder), "tokenizer")


def test_a_file_of_a_newer_version(folder: Path) -> None:
    change(folder / "tokenizer.json", model={"type": "SuperBPE", "vocab": {}})
    with pytest.raises(UserError, match=r"tokenizers [\d.]+ cannot read .* a newer version wrote \(pip install -U"):
        load_tokenizer(str(folder), "tokenizer")


def test_what_transformers_makes_of_the_files_is_compared_with_them(folder: Path) -> None:
    assert reading_difference(load_tokenizer(str(folder), "tokenizer"), str(folder)) == ""
    (folder / "added_tokens.json").write_text('{"[E1]": 76, "[E2]": 90}')
    said = reading_difference(load_tokenizer(str(folder), "tokenizer"), str(folder))
    assert said == "added_tokens.json gives '[E2]' the id 90, but transformers reads it as 77"
    (folder / "added_tokens.json").unlink()


def test_a_class_that_reads_a_tokenizer_otherwise_is_said(folder: Path) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    tokenizer = load_tokenizer(str(folder), "tokenizer")
    if tokenizer.tokenize("the") == ["the"]:
        pytest.skip("this version of transformers takes tokenizer.json as it is")
    assert "but its tokenizer.json says '[CLS] the [UNK]" in reading_difference(tokenizer, str(folder))
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # as it advises
    assert reading_difference(load_tokenizer(str(folder), "tokenizer"), str(folder)) == ""


def test_a_sentencepiece_model_names_the_package_that_reads_it(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    (folder / "sentencepiece.bpe.model").write_bytes(b"torn")
    said = "damaged, or not a SentencePiece model" if find_spec("sentencepiece") else "pip install sentencepiece"
    with pytest.raises(UserError, match=rf"tokenizer: .*sentencepiece.bpe.model is .*{said}"):
        load_tokenizer(str(folder), "tokenizer")
