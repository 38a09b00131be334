"""A classifier, regressor or span finder around any encoder, with a head that the task and the seed decide."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.config.places import command
from engine.errors import UserError
from engine.hub.config import load_config
from engine.hub.files import quiet
from engine.hub.tokenizer import load_tokenizer
from engine.models.hub import AUTO_CLASSES, Head, load_model, model_class, require_tensors
from engine.models.install import install
from engine.models.student import DROPOUTS
from engine.tasks.labels import label_meanings
from engine.tasks.specs import TaskSpec
from engine.tasks.spelling import spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HEAD_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "qa_dropout")
"""The names that encoders give to the dropout of a task head."""
INSIDE = ("student", "model")
"""Folders in which run directories keep their model: of launch/distill.py, of launch/finetune.py."""


def head_of(spec: TaskSpec) -> Head:
    return "span" if spec.kind == "span" else "classification"


def model_folder(path: str, *, key: str) -> str:
    """Returns `path`, or the model inside it when it is a run directory. Raises UserError for one without a model
    yet."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return path
    for name in INSIDE:
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    if (folder / "checkpoints").is_dir() or (folder / "records.jsonl").is_file():
        raise UserError(
            f"{key}={path!r} is a run directory without a model yet: let the run finish, or write its newest "
            f"checkpoint with `{command('export')} --run {path}`"
        )
    return path  # load_config says what is missing


def task_tokenizer(path: str, key: str, *configs: PretrainedConfig) -> tuple[PreTrainedTokenizerFast, str]:
    """Returns the tokenizer of a model, without token types when one of the models (`configs`) takes none; and a
    warning, or nothing. Raises UserError for one without a pad token."""
    tokenizer = load_tokenizer(path, key)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}={path!r}: its tokenizer has no pad token; add pad_token to tokenizer_config.json")
    without = [config.model_type for config in configs if not _takes_types(config)]
    if "token_type_ids" in tokenizer.model_input_names and without:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        if len(without) < len(configs):
            return tokenizer, f"token types are left out: model type {without[0]!r} takes none"
    return tokenizer, ""


def _takes_types(config: PretrainedConfig) -> bool:
    parameters = inspect.signature(model_class(config, "none").forward).parameters
    return "token_type_ids" in parameters and getattr(config, "type_vocab_size", 2) >= 2


def set_head(config: PretrainedConfig, spec: TaskSpec) -> None:
    """Writes the task's labels and kind into the configuration."""
    if spec.kind == "classification":
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: index for index, label in enumerate(spec.labels)}
        config.problem_type = "single_label_classification"
    else:
        config.num_labels = 1 if spec.kind == "regression" else 2
        config.problem_type = "regression" if spec.kind == "regression" else None


def output_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Returns what a classifier's configuration calls its outputs, by index."""
    names: dict[Any, str] = config.id2label or {}
    return tuple(str(names[index]) for index in sorted(names))


def has_numbered_outputs(config: PretrainedConfig) -> bool:
    """Tells whether the names of the outputs mean nothing: LABEL_0, LABEL_1 …, as transformers makes them up, or 0,
    1 …"""
    names = enumerate(map(spelling, output_names(config)))
    return all(name in (f"label_{index}", str(index)) for index, name in names)


def was_saved_with_head(config: PretrainedConfig, spec: TaskSpec) -> bool:
    """Tells whether the model was saved with a head for tasks of this kind."""
    return model_class(config, head_of(spec)).__name__ in (config.architectures or ())


def head_problem(config: PretrainedConfig, spec: TaskSpec, *, numbered: bool = False) -> str | None:
    """Returns why the head that a model was saved with is not one for this task; None when it is.

    The outputs of a classifier may have any order, which their names tell. numbered: accept names that tell nothing,
    for outputs in the order of the task.
    """
    if not was_saved_with_head(config, spec):
        wanted = model_class(config, head_of(spec)).__name__
        saved = ", ".join(config.architectures or ()) or "no class named in config.json"
        return f"it was saved without {AUTO_CLASSES[head_of(spec)][1]} ({saved}, not {wanted})"
    if spec.kind == "regression" and config.num_labels != 1:
        return f"it has {config.num_labels} outputs, the regression {spec.name} needs 1"
    if spec.kind == "classification" and label_meanings(output_names(config), spec) is None:
        if numbered and has_numbered_outputs(config) and config.num_labels == len(spec.labels):
            return None
        return (
            f"its labels are {', '.join(output_names(config))}, those of {spec.name} are {', '.join(spec.label_names)}"
        )
    return None


def head_remarks(path: str, *, key: str, config: PretrainedConfig, spec: TaskSpec) -> list[str]:
    """Returns what becomes of a saved head whose outputs are not the task's labels in their order."""
    if spec.kind != "classification" or not was_saved_with_head(config, spec):
        return []
    meant = label_meanings(output_names(config), spec)
    if meant == spec.labels:
        return []
    becomes = "its head is replaced by a new one" if meant is None else "they are put into this order"
    names, wanted = ", ".join(output_names(config)), ", ".join(spec.label_names)
    return [f"{key}={path!r}: its outputs are {names}, those of {spec.name} {wanted}; {becomes}"]


def require_head(path: str, *, key: str, config: PretrainedConfig, spec: TaskSpec) -> list[str]:
    """Returns remarks on a head for this task, in whatever order and names. Raises UserError for a model that was not
    fine-tuned on the task."""
    problem = head_problem(config, spec, numbered=True)
    if problem is not None:
        raise UserError(
            f"{key}={path!r} cannot teach {spec.name}: {problem}; fine-tune it on {spec.name} with "
            f"{command('finetune')} first"
        )
    if head_problem(config, spec) is None:
        return head_remarks(path, key=key, config=config, spec=spec)
    return [
        f"{key}={path!r}: its outputs have no names but {', '.join(output_names(config))}; they are taken for "
        f"{', '.join(spec.label_names)}, and it must score better than a constant answer before it teaches"
    ]


def load_task_model(
    path: str,
    *,
    key: str,
    spec: TaskSpec,
    dropout: float,
    seed: int,
    backend: str,
    head_required: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns the model with a head for the task, on the CPU, in train mode and ready for `capture`.

    path: model folder, run directory or hub name; `key` names its setting in errors. Every weight of the encoder must
    be there. A pooler that is not, and the head unless it was saved for the same labels, start from `seed` alone; the
    caller's random state is untouched. A saved head's outputs are put into the order of the task's labels. dropout: of
    encoder and head. backend: as resolved by `resolve_backend`. head_required: for a teacher; raises UserError unless
    all weights are there and the labels are the task's, or numbered.
    """
    path = model_folder(path, key=key)
    config = load_config(path, key)
    if head_required:
        require_head(path, key=key, config=config, spec=spec)
    other_labels = was_saved_with_head(config, spec) and head_problem(config, spec, numbered=head_required) is not None
    meant = label_meanings(output_names(config), spec) if was_saved_with_head(config, spec) else None
    set_head(config, spec)
    for name in (*DROPOUTS, *HEAD_DROPOUTS):
        if hasattr(config, name):
            setattr(config, name, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, difference = load_model(path, key=key, config=config, head=head_of(spec), dtype=dtype)
        absent = [name.split()[0] for name in difference.absent]
        needed = [name for name in absent if head_required or not _in_head(model, name)]
        require_tensors(needed, path=path, key=key, head=head_of(spec) if head_required else "none")
        if other_labels:
            model = _with_new_head(model, absent, seed)
    if meant is not None and meant != spec.labels:
        _put_in_order(model, [meant.index(label) for label in spec.labels])
    install(model, backend)
    return model.train()


def _in_head(model: PreTrainedModel, name: str) -> bool:
    """Tells whether a weight belongs to the head or the pooler, which a fine-tuning may start anew."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _with_new_head(model: PreTrainedModel, absent: list[str], seed: int) -> PreTrainedModel:
    """Returns the same encoder with a head from the seed: the head in the file tells other labels apart."""
    torch.manual_seed(seed)
    with quiet():
        fresh = type(model)(model.config)
    body = {
        name: value
        for name, value in model.state_dict().items()
        if name not in absent and name.startswith(f"{model.base_model_prefix}.")
    }
    fresh.load_state_dict(body, strict=False)
    nn.Module.to(fresh, model.dtype)
    return fresh


@torch.no_grad()
def _put_in_order(model: PreTrainedModel, order: list[int]) -> None:
    """Makes output i of the head what output order[i] was, in place."""
    base = f"{model.base_model_prefix}."
    heads = [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and not name.startswith(base)]
    last = next(part for part in reversed(heads) if part.out_features == len(order))
    last.weight.copy_(last.weight[order])
    if last.bias is not None:
        last.bias.copy_(last.bias[order])
