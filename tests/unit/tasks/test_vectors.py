"""Vectors of texts as sentence-transformers makes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_folder import MEAN, surround
from task_checks import check_error
from tiny_world import TinyWorld
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from engine.hub.sentence import read_sentence_encoder
from engine.tasks.vectors import TextVectors

STATES = torch.tensor([[[1.0, 4.0], [3.0, 0.0], [torch.nan, torch.nan]], [[1.0, 0.0], [2.0, -2.0], [3.0, 5.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
TEXTS = ["The small model learns.", "ONE", "not much else today, and a large teacher"]


@pytest.fixture
def model(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_world.teacher, tmp_path / "model")


def vectors_of(folder: Path) -> TextVectors:
    sentence, why = read_sentence_encoder(str(folder), "models")
    assert sentence is not None, why
    return TextVectors(sentence)


@pytest.mark.parametrize(
    ("kinds", "flags"),
    [
        (["Pooling"], {}),
        (["Pooling", "Dense", "Normalize"], {}),
        (["Pooling"], {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}),
        (["Pooling"], {"pooling_mode_cls_token": True}),
    ],
    ids=["mean", "dense", "max", "cls and mean"],
)
def test_they_are_those_of_the_library(kinds: list[str], flags: dict[str, Any], model: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    surround(model, kinds, pooling=MEAN | flags)
    vectors = vectors_of(model)
    batch = AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(model)(**batch).last_hidden_state
    ours = vectors(hidden, batch["attention_mask"])
    theirs = library.SentenceTransformer(str(model), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(cosine_similarity(ours, theirs), torch.ones(len(TEXTS)))
    assert vectors.is_mean == (kinds == ["Pooling"] and not flags)


def test_a_dense_layer_is_left_out_where_states_are_narrower(model: Path) -> None:
    vectors = vectors_of(surround(model, ["Pooling", "Dense"]))
    assert vectors(torch.ones(2, 3, 32), None).shape == (2, 24)
    assert vectors(torch.ones(2, 3, 16), None).tolist() == torch.ones(2, 16).tolist()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"prompts": {"query": "Q: ", "passage": "P: "}}, ("Text", "Q: Text", "P: Text")),
        ({"prompts": {"query": "Q: ", "corpus": "C: ", "document": "D: "}}, ("Text", "Q: Text", "D: Text")),
        ({"prompts": {"all": "A: ", "query": ""}, "default_prompt_name": "all"}, ("A: Text", "A: Text", "A: Text")),
        ({}, ("Text", "Text", "Text")),
    ],
)
def test_prompts(settings: dict[str, Any], wanted: tuple[str, str, str], model: Path) -> None:
    vectors = vectors_of(surround(model, settings=settings))
    assert (vectors.reads("Text", "text"), vectors.reads("Text", "query"), vectors.reads("Text", "document")) == wanted


def test_a_prompt_that_is_no_part_of_the_vector_is_refused(model: Path) -> None:
    surround(model, pooling=MEAN | {"include_prompt": False}, settings={"prompts": {"query": "Q: "}})
    assert vectors_of(model).reads("Text", "document") == "Text"
    check_error("include_prompt: false, so the prompt 'Q: '", lambda: vectors_of(model).reads("Text", "query"))


def test_lower_case_and_length(model: Path) -> None:
    vectors = vectors_of(surround(model, reading={"max_seq_length": 9, "do_lower_case": True}))
    assert vectors.reads("The TEXT", "text") == "the text"
    assert vectors.max_seq_length == 9


def test_a_plain_encoder_has_means() -> None:
    vectors = TextVectors(None)
    assert vectors.is_mean
    assert vectors.max_seq_length is None
    assert vectors.reads("Text", "query") == "Text"
    assert vectors(STATES, MASK).tolist() == [[2, 2], [2, 1]]
