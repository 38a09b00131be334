"""Reading config.json: a model that this transformers would compute as another one is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from engine.config.places import command
from engine.errors import UserError
from engine.hub.files import WEIGHT_FILES, lookup, quiet, read_json, require_whole, stored_tensors, unreadable

CONFIG = "config.json"
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # until transformers > 5.23: the first two are ignored without a word
    "position_embedding_type": (
        lambda value: value not in (None, "absolute"),
        "transformers 5 has no relative positions for this model type and would compute absolute ones",
    ),
    "pruned_heads": (bool, "transformers 5 does not prune heads and would compute all of them"),
    "quantization_config": (
        bool,
        "its weights are quantised, and the losses need plain ones: name the original model",
    ),
    "attention_type": (
        lambda value: value == "block_sparse",
        "transformers turns that into full attention at the first text of less than about 700 tokens, for good: write "
        "original_full if no text is longer",
    ),
    "attention_window": (bool, "its tokens attend to windows, and to tokens that each task chooses anew"),
    "is_decoder": (bool, "its attention looks back only; an encoder that sees the whole text is needed"),
    "add_cross_attention": (bool, "it reads a second text by cross-attention, which is not computed here"),
}
"""Settings of config.json that change what a model computes and are ignored by transformers or by us: when, and why."""
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""What the configuration of every encoder has, under these names or by its attribute map."""
HARMLESS = frozenset(
    (
        "architectures",
        "directionality",
        "finetuning_task",
        "gradient_checkpointing",
        "output_past",
        "cls_token_id",
        "sep_token_id",
        "mask_token_id",
    )
)
"""Settings that do not change what a model computes; so are those that begin with pooler_."""
UNDECLARED = frozenset(
    ["norm_rel_ebd", "position_buckets", "share_att_key", "conv_kernel_size", "conv_groups", "conv_act"]
)
"""Settings that DeBERTa v2 and v3 read, though their configuration class does not declare them."""


def load_config(path: str, key: str) -> PretrainedConfig:
    """Reads the configuration of a model folder or hub model; `key` names the setting in errors.

    Raises UserError for one that cannot be read, and for settings that change the computation and would be ignored.
    """
    folder, file = Path(path), Path(path) / CONFIG
    if folder.is_file():
        raise UserError(f"{key}={path!r} is a file; name the folder of the model: {folder.parent}")
    if folder.is_dir():
        _require_no_adapter(path, key)
        if not file.is_file() and not file.is_symlink():
            raise UserError(f"{key}={path!r}: the folder has no config.json; name {_model_inside(folder)}")
        require_whole(file, key)
        _require_type(path, read_json(file, key), key)
    try:
        with quiet():
            # False and not left out: transformers would ask on stdin whether to run a model's own code
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **lookup(path))
    except Exception as error:  # transformers raises nearly everything here
        raise unreadable(path, key, "configuration", error) from None
    config._attn_implementation = None  # which kernel it was trained with; ours is chosen by the run's own settings
    if getattr(config, "is_heterogeneous", False):
        raise UserError(
            f"{key}={path!r}: its layers differ in {', '.join(sorted(config.per_layer_attributes))} "
            "(per_layer_config), and students are made of layers of one shape; name a model whose layers are alike"
        )
    lacks = [name for name in SIZES if not hasattr(config, name)]
    if lacks or config.is_encoder_decoder:
        why = "it has a decoder" if config.is_encoder_decoder else f"its configuration has no {lacks[0]}"
        raise UserError(
            f"{key}={path!r}: model type {config.model_type!r} is not an encoder of token ids with attention ({why}); "
            "name one that is, such as BERT"
        )
    for name in SIZES:  # newer versions of transformers have refused it already
        if not isinstance(getattr(config, name), int):
            raise UserError(f"{key}={path!r}: config.json has {name}={getattr(config, name)!r}; write a whole number")
    known = type(config)().to_dict()
    for name, (applies, why) in REFUSED.items():
        honoured = name == "position_embedding_type" and name in known
        if applies(getattr(config, name, None)) and not honoured:
            raise UserError(f"{key}={path!r}: config.json has {name}={getattr(config, name)!r}; {why}")
    return config


def ignored_settings(config: PretrainedConfig, key: str) -> list[str]:
    """Returns a sentence about the settings of config.json that its class does not know, if there are any."""
    known = {*type(config)().to_dict(), *config.attribute_map, *HARMLESS, *UNDECLARED, *REFUSED}
    unknown = [
        name
        for name, value in config.to_dict().items()
        if name not in known and not name.startswith(("pooler_", "_")) and value not in (None, False, "", [], {})
    ]
    if not unknown:
        return []
    return [
        f"{key}: transformers {transformers.__version__} does not know {', '.join(unknown)} of its config.json, and "
        "ignores what they ask for"
    ]


def _require_no_adapter(path: str, key: str) -> None:
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(
            f"{key}={path!r}: it holds an adapter (adapter_config.json), which is not applied here; merge it into its "
            "model (PeftModel.merge_and_unload), save that, and name its folder"
        )


def _model_inside(folder: Path) -> str:
    """Returns what to name in place of a folder that is no model, but may hold one: a run directory, a hub's cache."""
    configs = (file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG}"))
    inside = sorted(file.parent for file in configs if b'"model_type"' in file.read_bytes())
    if inside:
        return f"the model inside it: {', '.join(map(str, inside[:3]))}"
    if any(folder.rglob("*_model_states.pt")):
        return f"the model of this checkpoint of DeepSpeed, once {command('export')} or zero_to_fp32.py has written it"
    return "a Hugging Face model folder (config.json, model.safetensors and the tokenizer's files)"


def _require_type(path: str, values: dict[str, Any], key: str) -> None:
    """Raises UserError for a config.json without a model type (TinyBERT's release), and suggests that which its tensors
    are named after."""
    if isinstance(values.get("model_type"), str) or "auto_map" in values:
        return
    owners: Counter[str] = Counter()
    if any((Path(path) / name).is_file() for name in WEIGHT_FILES):
        owners.update(name.split(".")[0] for name in stored_tensors(path, key))
    named = [owner for owner, _ in owners.most_common() if owner in CONFIG_MAPPING]
    remedy = f'its tensors are named as those of {named[0]!r}: add "model_type": "{named[0]}"' if named else "add it"
    raise UserError(f"{key}={path!r}: config.json has no model_type, which says how a model is computed; {remedy}")
