"""The student: a smaller model of the teacher's own type (or any folder), with random or copied weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.config.distill import StudentConfig
from engine.errors import UserError
from engine.hub.files import quiet
from engine.mapping import LayerMapping, round_half_up
from engine.models.apex import require_fused_layer_norm
from engine.models.hub import Head, SavedModel, init_arguments, load_backbone, model_class, shape_of
from engine.models.initialise import copy_from_teacher, intermediate_size, resolve_init
from engine.models.install import install
from engine.models.shape import ModelShape

DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)
"""The names that encoders give to the dropouts inside them. Dropouts of task heads are left alone."""


def build_student_config(
    cfg: StudentConfig, teacher_config: PretrainedConfig, sources: tuple[int, ...] | None = None
) -> PretrainedConfig:
    """Returns the configuration of a student that is made from the teacher: its class and values with the sizes of
    `cfg`.

    Unset: half of the teacher's layers (rounded down), its width, its heads, its feed-forward width scaled likewise.
    An embedding size that the teacher has on its own (ELECTRA, ALBERT) stays unless it equals the hidden size.
    sources: teacher layer of each student layer; where layers differ in kind (ModernBERT) a copied one keeps its kind.
    """
    teacher = shape_of(teacher_config, has_mlm_head=False)
    layers = cfg.layer_count(teacher.layers)
    hidden = cfg.hidden_size or teacher.width
    heads = cfg.heads or teacher.heads
    _check_heads(hidden, heads, teacher_config)
    values = teacher_config.to_dict()
    for name in ("architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version"):
        values.pop(name, None)
    renamed = getattr(teacher_config, "attribute_map", {})
    inner = values.get("inner_group_num", 1)
    if layers % inner:
        raise UserError(f"student.layers={layers} must be a multiple of the teacher's inner_group_num={inner}")
    values[renamed.get("num_hidden_layers", "num_hidden_layers")] = layers // inner
    values[renamed.get("hidden_size", "hidden_size")] = hidden
    values[renamed.get("num_attention_heads", "num_attention_heads")] = heads
    feed_forward = "hidden_dim" if "hidden_dim" in values else "intermediate_size"
    values[feed_forward] = cfg.intermediate_size or max(
        1, round_half_up(intermediate_size(teacher_config) * hidden, teacher.width)
    )
    values |= _attention_widths(values, teacher, hidden, heads)
    if values.get("embedding_size") == teacher.width:
        values["embedding_size"] = hidden
    if values.get("num_hidden_groups"):
        values["num_hidden_groups"] = min(values["num_hidden_groups"], layers // inner)
    if values.get("layer_types"):
        types = values["layer_types"]
        values["layer_types"] = [types[g - 1] for g in pattern_layers(sources or (0,) * layers, len(types))]
    values.update({name: cfg.dropout for name in DROPOUTS if name in values})
    with quiet():
        return type(teacher_config).from_dict(values)


def with_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Returns the configuration of student.path with all dropouts of its encoder set."""
    config = copy.deepcopy(config)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def _check_heads(hidden: int, heads: int, teacher_config: PretrainedConfig) -> None:
    if hidden % heads:
        divisors = [n for n in range(1, hidden + 1) if hidden % n == 0]
        raise UserError(
            f"student.heads={heads} must divide student.hidden_size={hidden}: "
            f"choose one of {', '.join(map(str, divisors))}, or another width"
        )
    if (hidden // heads) % 2 and getattr(teacher_config, "rope_parameters", None):
        raise UserError(
            f"student.heads={heads}: heads of width {hidden // heads} are odd, but model type "
            f"{teacher_config.model_type!r} rotates pairs of dimensions; choose a number that makes them even"
        )


def _attention_widths(values: dict[str, Any], teacher: ModelShape, hidden: int, heads: int) -> dict[str, int]:
    """Returns what some configurations write out (EuroBERT, Nomic BERT): the width of a head, and the number of key and
    value heads, of which each serves as many query heads as in the teacher. Raises UserError where that cannot be."""
    found = {}
    if values.get("head_dim") == teacher.width // teacher.heads:
        found["head_dim"] = hidden // heads
    if values.get("num_key_value_heads"):
        shared_by = teacher.heads // values["num_key_value_heads"]
        if heads % shared_by:
            raise UserError(
                f"student.heads={heads}: {shared_by} query heads of the teacher share a key and value head; choose a "
                f"multiple of {shared_by}"
            )
        found["num_key_value_heads"] = heads // shared_by
    return found


def pattern_layers(sources: tuple[int, ...], teacher_layers: int) -> tuple[int, ...]:
    """Returns the teacher layer whose kind (sliding or full attention) each student layer has: its source, else that of
    the teacher's pattern from the bottom."""
    return tuple(g or m % teacher_layers + 1 for m, g in enumerate(sources))


def build_student(
    cfg: StudentConfig,
    teacher: SavedModel,
    given: SavedModel | None,
    hidden_map: LayerMapping | None,
    with_mlm_head: bool,
    seed: int,
    backend: str,
) -> PreTrainedModel:
    """Returns the student in fp32 on the CPU, in train mode, ready for `capture`; the same weights for the same
    arguments.

    given: what student.path names; None: the student is made from the teacher. hidden_map: what `student.init=mapping`
    refers to. An MLM head that neither the folder nor the teacher has starts at random (its output matrix is the word
    embeddings). The caller's random state is untouched.
    """
    if given is not None:
        student = _load_given(given, with_dropout(given.config, cfg.dropout), with_mlm_head, seed)
    else:
        init = cfg.init or "random"
        shape = shape_of(teacher.config, has_mlm_head=False)
        sources = resolve_init(init, cfg.layer_count(shape.layers), shape.layers, hidden_map)
        student = new_model(build_student_config(cfg, teacher.config, sources), with_mlm_head, seed)
        if init != "random":
            head = teacher.mlm_or_none if with_mlm_head else "none"
            whole = load_backbone(teacher.path, key=teacher.key, config=teacher.config, head=head)
            copy_from_teacher(student, whole, sources)
    if cfg.fused_layer_norm:
        replace_layer_norm(student)
    if cfg.activation_checkpointing:
        enable_activation_checkpointing(student)
    install(student, backend)
    return student.train()


def new_model(config: PretrainedConfig, with_mlm_head: bool, seed: int) -> PreTrainedModel:
    """Returns a model with random weights that depend on the configuration and the seed alone."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        head: Head = "mlm" if with_mlm_head else "none"
        return model_class(config, head)(config, **init_arguments(config, head))


def _load_given(given: SavedModel, config: PretrainedConfig, with_mlm_head: bool, seed: int) -> PreTrainedModel:
    if not with_mlm_head or given.has_mlm_head:
        return load_backbone(given.path, key=given.key, config=config, head="mlm" if with_mlm_head else "none")
    student = new_model(config, with_mlm_head, seed)
    body = load_backbone(given.path, key=given.key, config=config)
    student.base_model.load_state_dict(body.state_dict())
    return student


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Keeps only each layer's input for the backward pass and recomputes the rest there."""
    options = {"use_reentrant": False}  # the reentrant kind cuts captured tensors off the graph
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # transformers before the rename
            model.gradient_checkpointing_enable(options)
    except ValueError:
        raise UserError(
            f"student.activation_checkpointing=true: transformers does not support it for model type "
            f"{model.config.model_type!r}; set it to false"
        ) from None


def replace_layer_norm(model: nn.Module) -> int:
    """Replaces every LayerNorm by NVIDIA Apex's FusedLayerNorm with the same parameters; returns how many.

    Raises UserError when Apex cannot be used, or for LayerNorms without bias (ModernBERT), which Apex has not.
    """
    require_fused_layer_norm()
    from apex.normalization import FusedLayerNorm

    replaced = 0
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.LayerNorm):
                continue
            if norm.bias is None:
                raise UserError("student.fused_layer_norm=true: this model's LayerNorms have no bias; set it to false")
            fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
            fused.weight, fused.bias = norm.weight, norm.bias
            setattr(parent, name, fused)
            replaced += 1
    return replaced
