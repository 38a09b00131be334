"""Reading Hugging Face folders and hub models, with errors that name the setting, and without transformers' chatter."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from engine.errors import UserError
from engine.models import hub
from engine.models.shape import ModelShape
from engine.records.fingerprints import digest

LOAD_ERRORS = (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)
Head = Literal["none", "mlm", "classification", "span"]
AUTO_CLASSES: dict[Head, tuple[Any, str]] = {
    "none": (AutoModel, "an encoder"),
    "mlm": (AutoModelForMaskedLM, "a masked-language-model head"),
    "classification": (AutoModelForSequenceClassification, "a sequence-classification head"),
    "span": (AutoModelForQuestionAnswering, "a question-answering head"),
}
CONVERT = (
    'convert it where you trust it: python -c "from transformers import AutoModel; '
    "AutoModel.from_pretrained('FOLDER').save_pretrained('NEW')\" (an MLM head needs AutoModelForMaskedLM)"
)
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 64, 64 * 1024
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_pickle_allowed = False


def allow_pickle(allowed: bool) -> None:
    """Whether this process may from now on read weights from pickles (pytorch_model.bin), and then tensors only. A plan
    sets it from its configuration. One switch of the process: no call that loads something can forget to ask."""
    global _pickle_allowed
    _pickle_allowed = allowed


@cache
def hub_is_reachable() -> bool:
    """Asked once, so that a mistyped folder is reported at once: huggingface_hub retries for half a minute."""
    if getproxies():
        return True  # only a request can tell
    url = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=5):
            return True
    except OSError:
        return False


def where(path: str) -> dict[str, bool]:
    """Arguments for from_pretrained: a folder or the hub's cache alone, where nothing else can be had."""
    return {"local_files_only": Path(path).is_dir() or not hub_is_reachable()}


def safely() -> dict[str, Any]:
    """Arguments for a model's from_pretrained: no pickle unless it is allowed, and never an object out of one."""
    return {"use_safetensors": None if _pickle_allowed else True, "weights_only": True}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and the table of unexpected keys; what matters of it is checked and raised here."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def not_readable(path: str, key: str, what: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        return UserError(
            f"{key}={path!r}: its {what} asks for Python code that comes with the model (auto_map), and such code is "
            "never run here; name a model whose class is part of transformers"
        )
    if Path(path).is_dir():
        return UserError(f"{key}={path!r}: cannot read the {what} in this folder: {reason}")
    return UserError(
        f"{key}={path!r}: no such folder (from {Path.cwd()}), and the hub gave no {what} of that name: {reason} "
        "Name a folder with config.json and model.safetensors, or a hub model while the hub can be reached."
    )


def load_config(path: str, key: str) -> PretrainedConfig:
    """The configuration of a model folder or hub model; `key` names the setting in errors."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"{key}={path!r}: the folder has no config.json; name a Hugging Face model folder "
            "(config.json, model.safetensors and the tokenizer's files)"
        )
    try:
        with quiet():
            # False and not left out: transformers would ask on stdin whether to run a model's own code
            return AutoConfig.from_pretrained(path, trust_remote_code=False, **where(path))
    except LOAD_ERRORS as error:
        raise not_readable(path, key, "configuration", error) from None


def load_tokenizer(path: str, key: str) -> Any:
    """The tokenizer of a model folder or hub model."""
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where(path))
    except LOAD_ERRORS as error:
        raise not_readable(path, key, "tokenizer", error) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when there are no files
        raise UserError(f"{key}={path!r}: no vocabulary there; add the tokenizer's files (tokenizer.json or vocab.txt)")
    return tokenizer


def shape_of(config: PretrainedConfig, has_mlm_head: bool) -> ModelShape:
    """The sizes of a model. ALBERT runs `inner_group_num` layers for each that its configuration counts."""
    return ModelShape(
        layers=config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        has_mlm_head=has_mlm_head,
    )


def model_class(config: PretrainedConfig, head: Head) -> type[PreTrainedModel]:
    """The Auto class' choice for this configuration. Raises UserError when there is none."""
    auto, what = AUTO_CLASSES[head]
    try:
        chosen: Any = auto._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"model type {config.model_type!r} has no class with {what} in transformers") from None
    first: type[PreTrainedModel] = chosen[0] if isinstance(chosen, (tuple, list)) else chosen
    return first


def init_arguments(config: PretrainedConfig, head: Head) -> dict[str, Any]:
    """Constructor arguments that leave out an optional pooler: no loss uses it, and it would get no gradient."""
    parameters = inspect.signature(model_class(config, head).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def skeleton(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """The model without storage (meta device), to ask it for names and sizes."""
    with torch.device("meta"), quiet():
        return model_class(config, head)(config, **init_arguments(config, head))


def load_backbone(
    path: str,
    *,
    key: str,
    config: PretrainedConfig,
    head: Head = "none",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model with its weights on the CPU, without pooler. `config` may ask for fewer layers than the file holds.

    Raises UserError when a weight that the model needs is missing from the file or has another shape.
    """
    arguments = init_arguments(config, head)
    load: Any = model_class(config, head).from_pretrained
    weight_file(path, key)  # refuses a pickle, with a remedy
    arguments |= {"config": config, "dtype": dtype, "output_loading_info": True}
    try:
        with quiet():
            model, info = load(path, **where(path), **safely(), **arguments)
    except LOAD_ERRORS as error:
        raise not_readable(path, key, "weights", error) from None
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{key}={path!r}: {len(missing)} weights are missing from the file or have another shape, "
            f"first {', '.join(missing[:3])}; name a folder whose weights fit its config.json"
            + (f" and hold {AUTO_CLASSES[head][1]}" if head != "none" else "")
        )
    loaded: PreTrainedModel = model
    return loaded


def has_mlm_weights(path: str, config: PretrainedConfig, key: str = "teacher.path") -> bool:
    """Whether the checkpoint holds a complete MLM head. Reads the names of its tensors, not the tensors."""
    try:
        model = skeleton(config, "mlm")
    except UserError:
        return False
    stored = {_modern_name(name) for name in _stored_names(path, key)}
    prefix = f"{model.base_model_prefix}."
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    head = {name for name in model.state_dict() if not name.startswith(prefix)}
    for name in head:
        partners = {name, tied.get(name, name)} | {target for target, source in tied.items() if source == name}
        if not partners & stored and not any(partner.startswith(prefix) for partner in partners):
            return False
    return bool(head)


def _modern_name(name: str) -> str:
    """LayerNorms of the first BERT checkpoints say gamma and beta; transformers renames them when it loads."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def weights_fingerprint(path: str, key: str) -> str:
    """Tells whether the weights of a model were replaced, without reading them all: sha256 over the size and 64 evenly
    spaced blocks of 64 KiB of each weight file (first and last block among them)."""
    digest = hashlib.sha256()
    for file in _weight_files(path, key):
        size = file.stat().st_size
        digest.update(str(size).encode())
        last = max(0, size - FINGERPRINT_BLOCK)
        with file.open("rb") as data:
            for i in range(FINGERPRINT_BLOCKS):
                data.seek(last * i // (FINGERPRINT_BLOCKS - 1))
                digest.update(data.read(FINGERPRINT_BLOCK))
    return digest.hexdigest()[:16]


def _weight_files(path: str, key: str) -> list[Path]:
    """The files that hold the tensors, in the order of their names."""
    found = weight_file(path, key)
    if not found.name.endswith(".index.json"):
        return [found]
    names = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
    return [Path(cached_file(path, name, **where(path))) for name in sorted(names)]


def weight_file(path: str, key: str) -> Path:
    """The first of WEIGHT_FILES that the model has."""
    for file_name in WEIGHT_FILES:
        try:
            found = cached_file(path, file_name, _raise_exceptions_for_missing_entries=False, **where(path))
        except LOAD_ERRORS as error:
            raise not_readable(path, key, "weights", error) from None
        if found is not None:
            require_no_pickle(path, key, Path(found).name)
            return Path(found)
    raise UserError(f"{key}={path!r}: found none of {', '.join(WEIGHT_FILES)}; the model has no weights")


def require_no_pickle(path: str, key: str, file_name: str) -> None:
    """Raises UserError when the weights are in a pickle, and that is not allowed."""
    if ".safetensors" not in file_name and not _pickle_allowed:
        raise UserError(
            f"{key}={path!r}: its weights are in {file_name}, a Python pickle, which can hold anything; {CONVERT}, or "
            "write allow_pickle=true (of it, tensors are read and nothing else)"
        )


def _stored_names(path: str, key: str) -> set[str]:
    """Names of the tensors in a checkpoint."""
    found = weight_file(path, key)
    if found.name.endswith(".index.json"):
        return set(json.loads(found.read_text(encoding="utf-8"))["weight_map"])
    if found.name.endswith(".safetensors"):
        with safe_open(found, framework="pt") as tensors:
            return set(tensors.keys())
    try:
        # PyTorch's format before 1.6 is no zip, and cannot be mapped
        mapped = zipfile.is_zipfile(found)
        return set(torch.load(found, map_location="meta", weights_only=True, mmap=mapped))
    except (RuntimeError, *LOAD_ERRORS) as error:
        raise not_readable(path, key, "weights", error) from None


def model_hashes(section: str, path: str, config: PretrainedConfig) -> dict[str, str]:
    """Of a model's architecture and weights, as `<section>.config_sha256` and `<section>.weights_sha256`."""
    architecture = config.to_dict()
    for name in ("transformers_version", "_name_or_path"):  # not of the model, but of who read it
        architecture.pop(name, None)
    return {
        f"{section}.config_sha256": digest(architecture),
        f"{section}.weights_sha256": hub.weights_fingerprint(path, key=f"{section}.path"),
    }
