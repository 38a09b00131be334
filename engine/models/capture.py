"""One adapter between models and losses: runs a forward pass and keeps the inner tensors that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from engine.data.batch import Batch
from engine.kernels.inputs import UNSCORED_LABEL
from engine.kernels.segments import Segments, segments_of_lengths
from engine.models.attention import DeepEnough, Recorder, recording
from engine.models.features import Features, Wanted
from engine.models.mlm_head import MlmHead, WholeLogits, output_matrix, without_output_matrix
from engine.models.own_attention import OwnAttention, own_attention
from engine.models.unpadding import packing, without_pads

FULL_FROM = {"cpu": 0.85, "cuda": 0.95}
"""Share of its positions from which a batch runs with its pads: leaving them out costs copies, and on a CPU shapes that
change. CPU: measured (docs/benchmarks.md, "Batches without pads"); CUDA: not measured."""
MOST_ROUNDED_UP = 1 / 16
"""Share of a batch's positions up to which a CPU keeps pads (engine/models/unpadding.py)."""


class NotCaptured(RuntimeError):
    """The model did not compute a tensor where it was looked for."""


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the distinct modules that transformers itself records as hidden states, in registration order; of a model
    that declares none, those of its one list of as many modules as it has layers.

    ALBERT has fewer of them than layers: it calls them several times. Empty when the layers are not known.
    """
    base = model.base_model
    spec = (getattr(base, "_can_record_outputs", None) or {}).get("hidden_states")
    if spec is None:
        lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == layer_calls(model)]
        return list(lists[0]) if len(lists) == 1 else []
    layers: dict[int, nn.Module] = {}
    for declared in spec if isinstance(spec, list) else [spec]:
        # a class, the end of a name, or an OutputRecorder, which transformers 5.0 keeps in another module than 5.23
        kind, ending = getattr(declared, "target_class", declared), getattr(declared, "class_name", None)
        if isinstance(declared, str):
            kind, ending = None, declared
        for path, module in base.named_modules():
            if (kind is not None and isinstance(module, kind)) or (ending is not None and path.endswith(ending)):
                layers[id(module)] = module
    return list(layers.values())


@dataclass
class _Progress:
    """State of one captured forward."""

    features: Features
    wanted: Wanted
    stop_early: bool = False
    layers: int = 0
    """Layer calls so far."""
    no_position: bool = False
    """No position was asked for, so one was fed to the head all the same."""


def capture(
    model: PreTrainedModel,
    batch: Batch,
    wanted: Wanted,
    *,
    forward: Callable[..., Any] | None = None,
    stop_early: bool = False,
    unpadded: bool = False,
) -> Features:
    """Runs the model (after `install`) on a batch; returns exactly the tensors that `wanted` names.

    model: an AutoModel without pooler, or an AutoModelForMaskedLM (needed for `wanted.logits`). Hidden states equal
    HF's `hidden_states[k]`, so the last one of ModernBERT has passed its final norm. Logits are computed only for the
    positions with a label, or for all real tokens when the batch has no labels. Gradients flow where they are on.
    forward: what to call instead of the model (the DeepSpeed engine around it). stop_early: leave the forward
    where nothing more is wanted, be it inside of a layer; only under no_grad, and not under ZeRO-3, which counts on
    seeing every module. unpadded: run the layers without pads, which the features then lack too (`runs_unpadded` says
    where that works)."""
    recorder = Recorder(wanted.attention, wanted.values, stop_after=wanted.last_attention if stop_early else None)
    progress = _Progress(recorder.features, wanted, stop_early and not wanted.whole)
    assert not (progress.stop_early and torch.is_grad_enabled()), "stop_early is for frozen models"
    output = None
    segments = recorder.features.segments = segments_of(batch) if unpadded else None
    decoder = output_matrix(model) if wanted.logits and forward is None else None
    try:
        with (
            recording(recorder),
            packing(segments, pad_at_end=wanted.task_logits),
            _hooks(model, progress, batch),
            _projection_hooks(model, recorder),
            _only_inputs_of(decoder),
        ):
            output = (forward or model)(**inputs_of(batch), return_dict=True)
    except DeepEnough:
        pass
    if wanted.logits:
        recorder.features.mlm_head = _mlm_head(model, output, decoder, progress)
    if wanted.task_logits:
        recorder.features.task_logits = task_logits(output)
    _check_complete(recorder, progress)
    return recorder.features


def hidden_states(
    model: PreTrainedModel, batch: Batch, layers: frozenset[int], *, unpadded: bool = False
) -> tuple[torch.Tensor, ...]:
    """Returns the states of these layers (0: embeddings) in their order, (B, L, D) each; what stands at pads means
    nothing. The model's head, if it has one, does not run. Arguments as of `capture`."""
    base: Any = model.base_model
    return padded_states(capture(base, batch, Wanted(hidden=layers), unpadded=unpadded), layers)


def padded_states(features: Features, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
    """Returns the hidden states of these layers in their order, (B, L, D) each, also where the batch ran without
    pads."""
    states = (features.hidden[layer] for layer in sorted(layers))
    return tuple(x if features.segments is None else features.segments.padded(x, 1) for x in states)


def segments_of(batch: Batch) -> Segments | None:
    """Returns where the real tokens of a padded batch lie without (most of) its pads; None for one that has few
    pads."""
    if batch.attention_mask is None or batch.lengths is None:
        return None
    if max(batch.lengths) != batch.input_ids.shape[1]:  # its heads expect pads that nobody would bring back
        return None
    rows, positions = sum(batch.lengths), batch.input_ids.numel()
    if batch.input_ids.device.type == "cpu":
        step = 2 ** int(math.log2(max(1.0, MOST_ROUNDED_UP * positions)))
        rows = min(-(-rows // step) * step, positions)
    full = rows >= FULL_FROM[batch.input_ids.device.type] * positions
    return None if full else segments_of_lengths(batch.lengths, rows)


def layer_calls(model: PreTrainedModel) -> int:
    """Returns how often a model's layers are called in one forward."""
    layers: int = model.config.num_hidden_layers * getattr(model.config, "inner_group_num", 1)
    return layers


def _only_inputs_of(decoder: nn.Linear | None) -> AbstractContextManager[None]:
    return nullcontext() if decoder is None else without_output_matrix(decoder)


def _mlm_head(
    model: PreTrainedModel, output: Any, decoder: nn.Linear | None, progress: _Progress
) -> MlmHead | WholeLogits:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise RuntimeError(f"{type(model).__name__} has no logits: load it with its MLM head")
    # (1, P, D) -> (P, D); an empty selection keeps its place in the graph, so that all parameters get gradients
    rows = logits[0, :0] if progress.no_position else logits[0]
    return WholeLogits(rows) if decoder is None else MlmHead(rows, decoder)


def inputs_of(batch: Batch) -> dict[str, torch.Tensor | None]:
    """Returns the arguments of a transformers model for a batch."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs if batch.token_types is None else {**inputs, "token_type_ids": batch.token_types}


def task_logits(output: Any) -> torch.Tensor:
    """Returns the logits of a task model: (B, labels) of a sequence classifier; (B, L, 2), start and end, of a question
    answerer."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: torch.Tensor = output.logits
    return logits


def _check_complete(recorder: Recorder, progress: _Progress) -> None:
    """Raises NotCaptured for a tensor that was asked for and did not come: it would be a silent zero in a loss."""
    missing = (progress.wanted.hidden - recorder.features.hidden.keys()) | (
        progress.wanted.attention - recorder.features.query.keys()
    )
    if missing:
        raise NotCaptured(
            f"layers {sorted(missing)} were not captured: the model ran {progress.layers} layers and "
            f"{recorder.calls} attention calls (was `install` called on it?)"
        )


@contextmanager
def _hooks(model: PreTrainedModel, progress: _Progress, batch: Batch) -> Iterator[None]:
    """Holds the hooks of one forward. They are removed before the backward pass, so recomputed layers are not
    captured."""
    wanted, hidden, segments = progress.wanted, progress.features.hidden, progress.features.segments

    def keep(output: torch.Tensor) -> None:
        hidden[progress.layers] = output if segments is None else without_pads(output, segments)

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if progress.layers == 0 and 0 in wanted.hidden:
            hidden[0] = args[0] if args else kwargs["hidden_states"]
            if progress.stop_early and wanted.deepest == 0:
                raise DeepEnough

    def after_layer(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        progress.layers += 1
        if progress.layers in wanted.hidden:
            keep(output[0] if isinstance(output, tuple) else output)
        if progress.stop_early and progress.layers == wanted.deepest:
            raise DeepEnough

    def after_base(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if progress.layers in wanted.hidden and getattr(model.config, "tie_last_hidden_states", None) is not False:
            keep(output[0])  # as in HF: a norm after the last layer belongs to its hidden state
        if wanted.logits:
            output.last_hidden_state = _rows(output[0], batch, progress)
        return output

    layers = layer_modules(model)
    handles = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after_layer) for layer in layers]
    handles.append(model.base_model.register_forward_hook(after_base))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _projection_hooks(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Holds hooks that record queries, keys and values of a model that computes its attention itself."""
    own = own_attention(type(model), model.config)
    if own is None or own.projections is None or not recorder.layers:
        yield
        return
    handles = [handle for layer in layer_modules(model) for handle in _record_projections(layer, own, recorder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record_projections(layer: nn.Module, own: OwnAttention, recorder: Recorder) -> list[RemovableHandle]:
    made: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        made[name] = output.unflatten(-1, (own.heads, -1)).transpose(1, 2)
        if name == "value":  # made last; what DeBERTa projects after it are its relative positions
            qkv = made["query"], made["key"], made["value"]
            made.clear()
            recorder.record(layer, qkv, own.scaling(qkv[0]), {})

    named = zip(("query", "key", "value"), own.modules(layer), strict=True)
    return [module.register_forward_hook(lambda _, __, output, name=name: keep(name, output)) for name, module in named]


def _rows(hidden: torch.Tensor, batch: Batch, progress: _Progress) -> torch.Tensor:
    """Returns (1, P, D) of (B, L, D) or (1, T, D): the positions whose logits are wanted, row-major. MLM heads work
    position by position, so they need not know that the others are gone."""
    chosen = batch.token_mask if batch.labels is None else batch.labels != UNSCORED_LABEL
    segments = progress.features.segments
    if segments is not None:
        hidden = without_pads(hidden, segments)
        if batch.labels is None:
            hidden, chosen = hidden[:, : segments.tokens], None
        else:
            chosen = segments.packed((batch.labels != UNSCORED_LABEL).unsqueeze(-1), 1)
    rows = hidden.flatten(0, 1)
    if chosen is None:
        return rows.unsqueeze(0)
    chosen = chosen.flatten()
    expected = int(batch.counts.tokens if batch.labels is None else batch.counts.masked)
    if expected:
        assert chosen.is_cuda or expected == int(chosen.sum()), "batch.counts do not belong to this batch"
        # the host knows the number, so the device need not be asked for it (boolean indexing would wait for it)
        index = torch.argsort(~chosen, stable=True)[:expected]
    else:
        index = chosen.nonzero().squeeze(1)
    progress.no_position = index.numel() == 0
    return rows[:1].unsqueeze(0) if progress.no_position else rows[index].unsqueeze(0)
