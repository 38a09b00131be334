"""Models of a configuration: class, sizes, and weights, which must be those that the model computes with."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from engine.errors import UserError, first_line
from engine.hub.config import load_config
from engine.hub.files import lookup, quiet, safety, stored_tensors, unreadable, weights_fingerprint
from engine.hub.sentence import encoder_folder
from engine.models.own_attention import own_attention
from engine.models.shape import ModelShape
from engine.models.windows import has_windows, windows_of
from engine.records.fingerprints import digest

Head = Literal["none", "mlm", "classification", "span"]
AUTO_CLASSES: dict[Head, tuple[Any, str]] = {
    "none": (AutoModel, "an encoder"),
    "mlm": (AutoModelForMaskedLM, "a masked-language-model head"),
    "classification": (AutoModelForSequenceClassification, "a sequence-classification head"),
    "span": (AutoModelForQuestionAnswering, "a question-answering head"),
}
HARMLESS = ("pooler.", "position_ids", "token_type_ids", "inv_freq")
"""Parts of names of tensors without which an encoder computes the same hidden states."""
HEADS = ("cls.", "classifier.", "lm_head.", "predictions.", "qa_outputs.", "head.", "decoder.", "fit_dense")
"""Beginnings of names of tensors beside an encoder, where the names of its own have no prefix."""


@dataclass(frozen=True)
class Difference:
    """What a checkpoint and the model of a configuration have not in common, under the names of the model."""

    missing: tuple[str, ...]
    """Tensors that the model has and the checkpoint lacks."""
    other_shape: tuple[str, ...]
    """Tensors with both shapes, where they differ."""
    left_over: tuple[str, ...]
    """Tensors of the checkpoint that the model does not take."""

    @property
    def absent(self) -> tuple[str, ...]:
        """What the model would compute with and does not get."""
        return (*self.missing, *self.other_shape)

    @classmethod
    def from_loading_info(cls, info: dict[str, Any]) -> Difference:
        """Reads the loading info of transformers."""
        shapes = {
            str(name): f"{name} {tuple(found)} instead of {tuple(own)}" for name, found, own in info["mismatched_keys"]
        }
        missing = sorted(set(info["missing_keys"]) - set(shapes))
        return cls(tuple(missing), tuple(shapes.values()), tuple(sorted(info["unexpected_keys"])))


@dataclass(frozen=True)
class SavedModel:
    """A model in a folder or on the hub, whose configuration has been read."""

    key: str
    """Name of the setting that names it."""
    path: str
    config: PretrainedConfig

    @classmethod
    def read(cls, key: str, path: str) -> SavedModel:
        """Reads the config.json of the model that setting `key` names. Raises UserError, as `load_config` does."""
        folder = encoder_folder(path, key)
        return cls(key, folder, load_config(folder, key))

    def __str__(self) -> str:
        return f"{self.key}={self.path!r}"

    @cached_property
    def has_mlm_head(self) -> bool:
        """Whether its files hold a complete masked-language-model head."""
        return has_head(self.path, key=self.key, config=self.config, head="mlm")

    @property
    def mlm_or_none(self) -> Head:
        """The head to load it with, where that of masked language models is wanted if there is one."""
        return "mlm" if self.has_mlm_head else "none"


def shape_of(config: PretrainedConfig, has_mlm_head: bool) -> ModelShape:
    """Returns the sizes of a model. ALBERT runs `inner_group_num` layers for each that its configuration counts.

    Raises UserError for one whose layers attend to anything else than all tokens or a window.
    """
    return ModelShape(
        layers=config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        has_mlm_head=has_mlm_head,
        windows=_windows_of(config.to_json_string(use_diff=False), config.model_type) if has_windows(config) else (),
        own_attention=own_attention(model_class(config, "none"), config),
    )


@cache
def _windows_of(settings: str, model_type: str) -> tuple[int | None, ...]:
    with quiet():
        return windows_of(skeleton(CONFIG_MAPPING[model_type].from_dict(json.loads(settings)), "none"))


def model_class(config: PretrainedConfig, head: Head) -> type[PreTrainedModel]:
    """Returns the class that the Auto class chooses for this configuration. Raises UserError when there is none."""
    auto, what = AUTO_CLASSES[head]
    try:
        chosen: Any = auto._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"model type {config.model_type!r} has no class with {what} in transformers") from None
    first: type[PreTrainedModel] = chosen[0] if isinstance(chosen, (tuple, list)) else chosen
    return first


def init_arguments(config: PretrainedConfig, head: Head) -> dict[str, Any]:
    """Returns constructor arguments that leave out an optional pooler: no loss uses it, and it would get no
    gradient."""
    parameters = inspect.signature(model_class(config, head).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def skeleton(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """Returns the model without storage (meta device), to ask it for names and sizes."""
    with torch.device("meta"), quiet():
        return model_class(config, head)(config, **init_arguments(config, head))


def load_model(
    path: str, *, key: str, config: PretrainedConfig, head: Head, dtype: torch.dtype, **arguments: Any
) -> tuple[PreTrainedModel, Difference]:
    """Returns the model on the CPU, and what its checkpoint lacks or has too much.

    Raises UserError for a checkpoint that cannot be read, or holds numbers that are not finite.
    """
    stored_tensors(path, key)  # refuses a pickle, and files that are not whole
    try:
        with quiet():
            model, info = _from_pretrained(path, config, head, dtype=dtype, **lookup(path), **safety(), **arguments)
    except Exception as error:  # of transformers, safetensors, pickle, and of packages that they import late
        raise unreadable(path, key, "weights", error) from None
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{key}={path!r}: {name} holds numbers that are not finite (NaN or infinite), with which no loss can "
                "be computed; name a checkpoint from before they were"
            )
    if head == "mlm" and not _is_tied(model):
        _settle_tie(model)
    return model, Difference.from_loading_info(info)


def _settle_tie(model: PreTrainedModel) -> None:
    """Makes the configuration of a model whose file holds two matrices say so; two that are the same are tied."""
    # until transformers > 5.23: it loads both, and lets the configuration say that they are tied
    output: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if output is not None and model.config.tie_word_embeddings and torch.equal(output.weight, embeddings.weight):
        model.tie_weights()
    else:
        model.config.tie_word_embeddings = False


def _is_tied(model: PreTrainedModel) -> bool:
    """Tells whether the output matrix is the word embeddings."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def compare(path: str, *, key: str, config: PretrainedConfig, head: Head) -> Difference:
    """Returns what the checkpoint of `path` and the model of `config` have not in common, without reading a tensor:
    tensors that repeat one zero stand for those of the file. Raises UserError when its names cannot be read, or when no
    model can be built from the configuration."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in stored_tensors(path, key).items()}
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            _, info = _from_pretrained(None, config, head, state_dict=state)
    except ImportError as error:
        raise unreadable(path, key, "model", error) from None
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{key}={path!r}: no model can be built from its config.json ({why}); correct it, or copy it again"
        ) from None
    return Difference.from_loading_info(info)


def _from_pretrained(path: str | None, config: PretrainedConfig, head: Head, **arguments: Any) -> Any:
    load: Any = model_class(config, head).from_pretrained
    return load(path, config=copy.deepcopy(config), output_loading_info=True, ignore_mismatched_sizes=True, **arguments)


def load_backbone(
    path: str,
    *,
    key: str,
    config: PretrainedConfig,
    head: Head = "none",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns the model with its weights on the CPU, without pooler. `config` may ask for fewer layers than the file
    holds.

    Raises UserError when a weight that the model needs is missing from the file or has another shape.
    """
    model, difference = load_model(path, key=key, config=config, head=head, dtype=dtype, **init_arguments(config, head))
    require_tensors(difference.absent, path=path, key=key, head=head)
    return model


def require_tensors(absent: Sequence[str], *, path: str, key: str, head: Head = "none") -> None:
    """Raises UserError when there are any tensors that the checkpoint lacks, or has in another shape."""
    if absent:
        raise UserError(
            f"{key}={path!r}: {len(absent)} weights are missing from the file or have another shape, "
            f"first {', '.join(absent[:3])}; name a folder whose weights fit its config.json"
            + (f" and hold {AUTO_CLASSES[head][1]}" if head != "none" else "")
        )


def require_encoder(path: str, *, key: str, config: PretrainedConfig) -> None:
    """Raises UserError unless the checkpoint holds the encoder of `config`, whole, and nothing of another encoder."""
    stored = stored_tensors(path, key)
    prefix = f"{model_class(config, 'none').base_model_prefix}."
    difference = compare(path, key=key, config=config, head="none")
    absent = [name for name in difference.absent if not any(part in name for part in HARMLESS)]
    if absent:
        _refuse_wrapper(stored, (prefix + absent[0], absent[0]), path=path, key=key)
    require_tensors(absent, path=path, key=key)
    has_prefix = any(name.startswith(prefix) for name in stored)
    of_another = [
        name
        for name in difference.left_over
        if (name.startswith(prefix) if has_prefix else not name.startswith(HEADS))
        and not any(part in name for part in HARMLESS)
    ]
    if of_another:
        raise UserError(
            f"{key}={path!r}: its file holds {len(of_another)} weights that a {config.model_type} model of its "
            f"config.json ({config.num_hidden_layers} layers) does not take in transformers "
            f"{transformers.__version__}, first {', '.join(of_another[:3])}: it would be computed as another model; "
            "name a folder whose weights fit its config.json"
        )


def _refuse_wrapper(stored: Iterable[str], endings: Iterable[str], *, path: str, key: str) -> None:
    """Raises UserError when the tensors have the names that a wrapper (DataParallel, torch.compile) gave them, or those
    of another model type. endings: the names that one of them would have without it."""
    for ending, name in itertools.product(endings, stored):
        if name.endswith(f".{ending}"):
            wrapper = name.removesuffix(ending)
            kind = wrapper.split(".")[-2]
            if kind in CONFIG_MAPPING:
                raise UserError(
                    f"{key}={path!r}: its weights are named as those of model type {kind!r}, but its config.json is of "
                    "another; copy the config.json that belongs to them"
                )
            raise UserError(
                f"{key}={path!r}: the names of its weights begin with {wrapper!r}, which a wrapper put there; save the "
                'model inside it, or rename them: python -c "from safetensors.torch import load_file, save_file; '
                f"f = 'model.safetensors'; save_file({{k.removeprefix('{wrapper}'): v for k, v in "
                "load_file(f).items()}, f, {'format': 'pt'})\""
            )


def has_head(path: str, *, key: str, config: PretrainedConfig, head: Head) -> bool:
    """Tells whether the checkpoint holds a complete head of this kind."""
    try:
        prefix = f"{model_class(config, head).base_model_prefix}."
    except UserError:
        return False
    difference = compare(path, key=key, config=config, head=head)
    return all(name.startswith(prefix) for name in difference.absent)


def model_hashes(section: str, saved: SavedModel) -> dict[str, str]:
    """Returns hashes of architecture and weights, as `<section>.config_sha256` and `<section>.weights_sha256`."""
    architecture = saved.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):  # not of the model, but of who read it
        architecture.pop(name, None)
    return {
        f"{section}.config_sha256": digest(architecture),
        f"{section}.weights_sha256": weights_fingerprint(saved.path, key=saved.key),
    }
