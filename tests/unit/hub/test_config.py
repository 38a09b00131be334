"""Settings of config.json that this version of transformers ignores: refused, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, save_tiny
from transformers import BertConfig, GPT2Config, T5Config, ViTConfig

from engine.errors import UserError
from engine.hub.config import ignored_settings, load_config
from engine.hub.files import allow_pickle


def change(folder: str, *, remove: tuple[str, ...] = (), **values: Any) -> None:
    file = Path(folder) / "config.json"
    found = {name: value for name, value in json.loads(file.read_text()).items() if name not in remove}
    file.write_text(json.dumps(found | values))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"position_embedding_type": "relative_key_query"}, "would compute absolute ones"),
        ({"pruned_heads": {"0": [1]}}, "would compute all of them"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised"),
        ({"is_decoder": True}, "looks back only"),
        ({"attention_type": "block_sparse"}, "full attention at the first text"),
        ({"attention_window": [512]}, "windows"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(setting: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    change(path, **setting)
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=rf"teacher.path=.*config.json has {name}=.*{said}") as error:
        load_config(path, "teacher.path")
    assert str(value) in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_transformers_saves_it_is_read_without_a_note(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path)
    old = {
        "gradient_checkpointing": False,
        "directionality": "bidi",
        "pooler_type": "first_token_transform",
        "sep_token_id": 3,
    }
    change(path, position_embedding_type="absolute", pruned_heads={}, finetuning_task="sst2", **old)
    assert ignored_settings(load_config(path, "teacher.path"), "teacher.path") == []


def test_settings_that_nobody_knows_are_named(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    change(path, rotary_base=10_000, use_glu=True, unused=None, auto_map={"AutoModel": "modeling_own.OwnModel"})
    (note,) = ignored_settings(load_config(path, "teacher.path"), "teacher.path")
    assert "does not know rotary_base, use_glu, auto_map of its config.json" in note


def test_the_model_type_is_suggested_from_the_names_of_the_tensors(tmp_path: Path) -> None:
    """TinyBERT's release has cell, emb_size and structure in config.json, fit_dense in its weights, and no type."""
    folder = tmp_path / "TinyBERT_General_4L_312D"
    path = save_tiny("bert", folder, mlm=True)
    change(path, remove=("model_type", "architectures"), cell={}, emb_size=312, structure=[])
    torch.save(
        load_file(folder / "model.safetensors") | {"fit_dense.weight": torch.ones(3, 3)}, folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    allow_pickle(True)
    try:
        with pytest.raises(UserError, match=r'config.json has no model_type.*of \'bert\': add "model_type": "bert"'):
            load_config(path, "student.path")
        change(path, model_type="bert")
        assert load_config(path, "student.path").model_type == "bert"
    finally:
        allow_pickle(False)


@pytest.mark.parametrize(("config", "why"), [(T5Config(), "it has a decoder"), (ViTConfig(), "no vocab_size")])
def test_models_that_read_no_text(config: Any, why: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is not an encoder of token ids with attention .*{why}"):
        load_config(str(tmp_path), "teacher.path")
    GPT2Config().save_pretrained(tmp_path)
    assert load_config(str(tmp_path), "teacher.path").model_type == "gpt2"  # that it looks back shows when it runs


def test_a_json_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="holds a list, not a dict"):
        load_config(str(tmp_path), "teacher.path")
    (tmp_path / "config.json").write_bytes(b'{"model_type": "b\xe9rt"}')
    with pytest.raises(UserError, match="is torn, or no JSON"):
        load_config(str(tmp_path), "teacher.path")


@pytest.mark.parametrize(
    "inside",
    ["student", "0_Transformer", "snapshots/0123abc"],
    ids=["a run directory", "sentence-transformers", "a hub's cache"],
)
def test_a_folder_that_holds_the_model_names_it(inside: str, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / inside)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 48}')
    with pytest.raises(UserError, match=rf"has no config\.json; name the model inside it: {tmp_path / inside}"):
        load_config(str(tmp_path), "teacher.path")


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "mp_rank_00_model_states.pt").touch()
    for folder in (tmp_path, tmp_path / "step-00000004"):
        with pytest.raises(UserError, match=r"name the model of this checkpoint .* once python launch/export.py"):
            load_config(str(folder), "teacher.path")


def test_a_file_is_no_model_and_an_adapter_is_half_of_one(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    with pytest.raises(UserError, match=f"model.safetensors' is a file; name the folder of the model: {tmp_path}"):
        load_config(f"{path}/model.safetensors", "teacher.path")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"holds an adapter .* merge it into its model"):
        load_config(path, "teacher.path")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds an adapter .* merge it into its model"):
        load_config(path, "teacher.path")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_the_attention_it_was_trained_with_is_not_asked_for(name: str, tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    change(path, **{name: "flash_attention_2"})
    assert load_config(path, "teacher.path")._attn_implementation is None


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    change(path, num_hidden_layers="4")
    with pytest.raises(UserError, match=r"num_hidden_layers.*4") as error:
        load_config(path, "teacher.path")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(BertConfig(), "is_heterogeneous"), reason="this transformers has no such models")
def test_layers_of_several_shapes_are_refused(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path)
    change(path, per_layer_config={"0": {"intermediate_size": 32}})
    with pytest.raises(UserError, match=r"its layers differ in intermediate_size \(per_layer_config\)"):
        load_config(path, "teacher.path")
