"""Corpus, tokenizer and models two by two: every family fits when it fits, and each check finds what does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import FAMILIES, VOCAB, save_tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from engine.errors import UserError
from engine.models.fit import CHECKS, Parts, check_fit, longest_input
from engine.models.hub import SavedModel, load_backbone

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = ("the", "The", "model", *(f"word{n}" for n in range(VOCAB)))
COUNTED_FROM_PAD = ("roberta", "xlm-roberta", "mpnet")
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_tokenizer(words: Iterable[str] = WORDS, *, lower: bool = False, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """As many tokens as the tiny models have embeddings."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words][:VOCAB])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token=pad,
        mask_token="<mask>",
    )


def member(family: str, folder: Path, key: str = "teacher.path", tokenizer: Any = None) -> SavedModel:
    path = save_tiny(family, folder, mlm=True)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return SavedModel.read(key, path)


def again(model: SavedModel) -> SavedModel:
    """After its folder has changed."""
    return SavedModel.read(model.key, model.path)


@every_family
def test_what_fits_is_accepted_without_a_note(family: str, tmp_path: Path) -> None:
    model, student = member(family, tmp_path / "a"), member(family, tmp_path / "b", "student.path")
    length = 38 if family in COUNTED_FROM_PAD else 40
    assert longest_input(model.config) == length
    assert check_fit(Parts(make_tokenizer(), (model, student), length=length, length_of="task.seq_len")) == []


def rewrite(model: SavedModel, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = Path(model.path) / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


def inner(tensors: dict[str, torch.Tensor]) -> str:
    """The name of a matrix of the last layer."""
    return max(name for name, tensor in tensors.items() if "layer" in name and tensor.ndim == 2)


@every_family
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"{inner(t)}_of_relative_positions": torch.ones(3, 8), **t}, "does not take in transformers"),
        (lambda t: {name: value for name, value in t.items() if name != inner(t)}, "1 weights are missing"),
        (lambda t: t | {inner(t): torch.ones(3, 5)}, r"1 weights are missing .*\(3, 5\) instead of"),
        (lambda t: {f"module.{name}": value for name, value in t.items()}, "begin with 'module.', which a wrapper"),
        (lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}, "begin with '_orig_mod.', which"),
        (
            lambda t: {f"nystromformer.{name}": value for name, value in t.items()},
            "those of model type 'nystromformer'",
        ),
    ],
    ids=["too much", "missing", "another shape", "DataParallel", "compiled", "another type"],
)
def test_weights_of_another_model(family: str, change: Any, said: str, tmp_path: Path) -> None:
    model = member(family, tmp_path)
    rewrite(model, change)
    with pytest.raises(UserError, match=f"teacher.path=.*{said}"):
        check_fit(Parts(make_tokenizer(), (model,)))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])  # whose layers are one
def test_more_layers_than_the_configuration_counts(family: str, tmp_path: Path) -> None:
    model = member(family, tmp_path)
    file = Path(model.path) / "config.json"
    values = json.loads(file.read_text())
    values["n_layers" if family == "distilbert" else "num_hidden_layers"] = 3
    if "layer_types" in values:
        del values["layer_types"][3:]
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"\(3 layers\) does not take"):
        check_fit(Parts(make_tokenizer(), (again(model),)))


@pytest.mark.parametrize(("name", "value"), [("hidden_act", "gelu_fancy"), ("pad_token_id", 500)])
def test_a_configuration_that_no_model_can_be_built_from(name: str, value: Any, tmp_path: Path) -> None:
    model = member("bert", tmp_path)
    setattr(model.config, name, value)
    with pytest.raises(UserError, match=r"teacher.path=.* no model can be built from its config.json \(\w+: "):
        check_fit(Parts(make_tokenizer(), (model,)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    model = member("bert", tmp_path)
    name = "bert.encoder.layer.2.output.dense.bias"
    rewrite(model, lambda t: t | {name: torch.full_like(t[name], value)})
    with pytest.raises(
        UserError, match=r"teacher.path=.* encoder.layer.2.output.dense.bias holds numbers that are not"
    ):
        load_backbone(model.path, key=model.key, config=model.config)


def test_what_is_beside_the_encoder_is_harmless(tmp_path: Path) -> None:
    model = member("bert", tmp_path)
    rewrite(model, lambda t: t | {"bert.pooler.dense.weight": torch.ones(2), "fit_denses.0.weight": torch.ones(3)})
    rewrite(model, lambda t: t | {"bert.embeddings.position_ids": torch.arange(40), "classifier.bias": torch.ones(2)})
    assert check_fit(Parts(make_tokenizer(), (model,))) == []


@every_family
def test_a_token_without_an_embedding(family: str, tmp_path: Path) -> None:
    model, tokenizer = member(family, tmp_path), make_tokenizer()
    tokenizer.add_tokens(["covid"])
    with pytest.raises(UserError, match=f"embeddings for {VOCAB} tokens, but the tokenizer gives ids up to {VOCAB}"):
        check_fit(Parts(tokenizer, (model,)))
    assert check_fit(Parts(make_tokenizer(WORDS[:30]), (model,))) == [], "a matrix may have rows to spare"


@every_family
def test_a_second_model_that_reads_other_words(family: str, tmp_path: Path) -> None:
    model = member(family, tmp_path / "a")
    other = member(family, tmp_path / "b", "student.path", make_tokenizer(reversed(WORDS[: VOCAB - len(SPECIAL)])))
    with pytest.raises(UserError, match=r"student.path=.*has another vocabulary than teacher.path=.*e.g. '"):
        check_fit(Parts(make_tokenizer(), (model, other)))
    assert check_fit(Parts(make_tokenizer(WORDS[:30]), (model, model))) == [], "more words of its own do no harm"


@every_family
def test_another_pad_token(family: str, tmp_path: Path) -> None:
    parts = Parts(make_tokenizer(pad="</s>"), (member(family, tmp_path),))
    if family in COUNTED_FROM_PAD:
        with pytest.raises(UserError, match=r"counts positions from pad_token_id=1 .*set pad_token_id to 2"):
            check_fit(parts)
    else:
        (note,) = check_fit(parts)
        assert "pad_token_id=1, but the tokenizer's is 2" in note


@every_family
def test_text_that_is_longer_than_the_positions(family: str, tmp_path: Path) -> None:
    model = member(family, tmp_path)
    longest = longest_input(model.config)
    assert longest is not None
    with pytest.raises(UserError, match=rf"task.seq_len=41, but teacher.path=.* takes {longest} tokens at most"):
        check_fit(Parts(make_tokenizer(), (model,), length=41, length_of="task.seq_len=41"))


def test_lower_case_against_capitals(tmp_path: Path) -> None:
    def noted(tokenizer: PreTrainedTokenizerFast) -> str:
        (note,) = check_fit(Parts(tokenizer, (member("bert", tmp_path, tokenizer=tokenizer),)))
        return note

    note = noted(make_tokenizer((word.capitalize() for word in WORDS), lower=True))
    assert "have capitals, but its tokenizer makes all text lower case" in note
    assert "correct the normalizer in tokenizer.json if" in note
    note = noted(make_tokenizer(word for word in WORDS if word.islower()))
    assert "its vocabulary has no capitals" in note
    assert "such words become <unk>" in note


def test_a_tokenizer_that_does_not_do_what_its_file_says(tmp_path: Path) -> None:
    model = member("bert", tmp_path, tokenizer=make_tokenizer(lower=True))
    (note,) = check_fit(Parts(make_tokenizer(), (model,)))
    assert "but its tokenizer.json says 'the <unk>" in note


def test_a_model_that_looks_back_only(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    LlamaModel(LlamaConfig(**sizes, intermediate_size=16, max_position_embeddings=40)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = SavedModel.read("teacher.path", str(tmp_path))
    with pytest.raises(UserError, match=r"teacher.path=.*attends to the left only"):
        check_fit(Parts(make_tokenizer(), (model,)))


def test_every_check_of_the_table_says_what_it_compares() -> None:
    assert all(check.compares and check.otherwise in ("an error", "a note") for check in CHECKS)
