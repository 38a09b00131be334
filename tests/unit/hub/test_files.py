"""Files of a model folder that are not what they should be: one line that names the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import save_tiny_teacher

from engine.errors import UserError
from engine.hub.config import load_config
from engine.hub.files import allow_pickle, stored_tensors, weight_files
from engine.hub.tokenizer import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny_teacher(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pickles() -> Iterator[None]:
    allow_pickle(True)
    yield
    allow_pickle(False)


def sharded(model: Path) -> dict[str, torch.Tensor]:
    """Rewrites the weights as two files with an index, as large checkpoints have them."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def test_names_and_shapes_are_read_without_the_tensors(model: Path, pickles: None) -> None:
    tensors = load_file(model / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert stored_tensors(str(model), "teacher.path") == shapes
    sharded(model)
    assert len(weight_files(str(model), "teacher.path")) == 2
    assert stored_tensors(str(model), "teacher.path") == shapes
    for file in model.glob("model*"):
        file.unlink()
    for zipped in (True, False):
        torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert stored_tensors(str(model), "teacher.path") == shapes


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0123")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "git-lfs pointer": (lambda file: file.write_text(POINTER), r"is a git-lfs pointer.*`git lfs pull` in"),
    "empty": (lambda file: file.write_bytes(b""), "is empty; copy or download it again"),
    "cut": (cut, r"is cut, or no safetensors file|is torn, or no JSON|holds something else"),
    "link": (dangle, r"is a link to .*, which is not there"),
    "page": (
        lambda file: file.write_text("<!doctype html>\n<title>404</title>"),
        r"no safetensors|no JSON|something else",
    ),
}


FILES = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "a shard",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read(path: str) -> None:
    """What every job reads of a model before it starts."""
    load_config(path, "teacher.path")
    load_tokenizer(path, "teacher.path")
    stored_tensors(path, "teacher.path")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_remedy(name: str, damage: str, model: Path, pickles: None) -> None:
    file = model / name
    if name in ("model.safetensors.index.json", "a shard"):
        sharded(model)
        file = model / "model-00002-of-00002.safetensors" if name == "a shard" else file
    elif name == "pytorch_model.bin":
        torch.save(load_file(model / "model.safetensors"), file)
        (model / "model.safetensors").unlink()
    spoil, said = DAMAGE[damage]
    spoil(file)
    with pytest.raises(UserError, match=said) as error:
        read(str(model))
    assert "teacher.path" in str(error.value)
    assert file.name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_index_that_names_a_file_which_is_not_there(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json names model-00002-of-00002.safetensors, which is not there"):
        stored_tensors(str(model), "teacher.path")
    index = model / "model.safetensors.index.json"
    index.rename(model / "index")
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is a part of them, whose index is missing"):
        stored_tensors(str(model), "teacher.path")
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index.json has no weight_map"):
        stored_tensors(str(model), "teacher.path")


def test_a_pickle_that_holds_no_dictionary_of_tensors(model: Path, pickles: None) -> None:
    (model / "model.safetensors").unlink()
    for saved, said in (([torch.zeros(2)], "a list"), ({"state_dict": {}, "epoch": 3}, "state_dict, epoch")):
        torch.save(saved, model / "pytorch_model.bin")
        with pytest.raises(UserError, match=rf"pytorch_model.bin holds something else than tensors \({said}\)"):
            stored_tensors(str(model), "teacher.path")


@pytest.mark.parametrize("name", ["tf_model.h5", "model.gguf", "model.fp16.safetensors"])
def test_weights_in_another_format_are_named(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=f"found none of .*; {name} has another format or name; save the model with"):
        stored_tensors(str(model), "teacher.path")


def test_a_checkpoint_of_deepspeed_says_how_it_becomes_a_model(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "zero_to_fp32.py").touch()
    with pytest.raises(UserError, match=rf"python {model}/zero_to_fp32.py --safe_serialization {model} {model}$"):
        stored_tensors(str(model), "teacher.path")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_that_transformers_would_not_read(name: str, encoding: str, model: Path) -> None:
    (model / name).write_text((model / name).read_text(), encoding=encoding)
    with pytest.raises(UserError, match=f"{name} is torn, or no JSON in UTF-8"):
        read(str(model))
