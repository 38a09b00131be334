"""Prepares a model for `capture`: gives it our attention functions, and proves by trying that it can be captured, and
run without pads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from engine.data.batch import Batch, Counts
from engine.errors import UserError, first_line
from engine.hub.files import quiet
from engine.models.attention import IMPLEMENTATIONS, Recorder, recording
from engine.models.capture import NotCaptured, capture, layer_calls, layer_modules
from engine.models.features import Wanted
from engine.models.mlm_head import check_output_matrix
from engine.models.own_attention import OwnAttention, own_attention
from engine.models.unpadding import install_packing

REMEDY = "choose an encoder such as BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, ModernBERT, MPNet or DeBERTa"


def install(model: PreTrainedModel, backend: str) -> None:
    """Switches the model to our attention functions and proves with a forward of 4 tokens that they are called. Of a
    model that computes its attention itself it proves that its layers' outputs are its hidden states.

    backend: sdpa, eager or flash_attention_2 (see `resolve_backend`); the model's own attention ignores it. Call it
    before DeepSpeed shards the model. Raises UserError for a model that cannot be captured.
    """
    layers = layer_modules(model)
    if not layers:
        raise UserError(f"model type {model.config.model_type!r}: which modules are its layers is unknown; {REMEDY}")
    own = own_attention(type(model), model.config)
    if own is not None:
        _probe_own(model, own)
        return
    if backend == "flash_attention_2":  # its kernels refuse the CPU and fp32, in which models are built
        install(model, "sdpa")
        _switch(model, backend)
        return
    _switch(model, backend)
    _probe(model)
    install_packing(layers)


@contextmanager
def runnable_anywhere(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model run on a CPU and in fp32 whatever backend was installed: flash attention gives way to sdpa."""
    backend = model.config._attn_implementation
    if backend != IMPLEMENTATIONS["flash_attention_2"]:
        yield
        return
    _switch(model, "sdpa")
    try:
        yield
    finally:
        _switch(model, "flash_attention_2")


def _switch(model: PreTrainedModel, backend: str) -> None:
    name, kind = IMPLEMENTATIONS[backend], model.config.model_type
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it only warns where we raise
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"model type {kind!r} does not support attention={backend!r}: {error}") from None
    finally:
        hf_logging.set_verbosity(verbosity)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    was_training = model.training
    recorder, outputs = Recorder(frozenset(), values=False), list[Any]()
    handles = [layer.register_forward_hook(lambda *_: outputs.append(None)) for layer in layer_modules(model)]
    try:
        with recording(recorder):
            model.eval()(input_ids=ids)
        layers = len(outputs)  # the model runs again below
        check_output_matrix(model, ids)
    except (TypeError, ValueError) as error:
        raise UserError(f"model type {model.config.model_type!r} does not run on token ids alone: {error}") from None
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if recorder.calls == 0 or recorder.calls != layers:
        raise UserError(
            f"model type {model.config.model_type!r} made {recorder.calls} calls of the attention interface in "
            f"{layers} layers, expected one for each; {REMEDY}"
        )
    if recorder.causal:
        raise UserError(f"model type {model.config.model_type!r} attends to the left only; {REMEDY}")


@torch.no_grad()
def _probe_own(model: PreTrainedModel, own: OwnAttention) -> None:
    """Raises UserError unless the model's own hidden states are what is captured, and its first token sees the last."""
    ids = torch.tensor([[5, 5, 5, 5], [5, 5, 5, 6]], device=model.device)
    kind, layers = model.config.model_type, layer_calls(model)
    numbers = range(1, layers + 1) if own.projections is not None else ()
    wanted = Wanted(hidden=frozenset(range(layers + 1)), attention=frozenset(numbers))
    was_training = model.training
    try:
        with quiet():
            states = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states
            captured = capture(model, Batch(ids, None, None, Counts()), wanted).hidden
            check_output_matrix(model, ids)
    except (TypeError, ValueError) as error:
        raise UserError(f"model type {kind!r} does not run on token ids alone: {first_line(error)}") from None
    except NotCaptured:
        raise UserError(f"model type {kind!r} does not call its layers as modules; {REMEDY}") from None
    finally:
        model.train(was_training)
    is_cut = getattr(model.config, "tie_last_hidden_states", None) is False  # its last layer lacks the final norm
    compared = range(layers if is_cut else layers + 1)
    if len(states) != layers + 1 or not all(torch.equal(captured[layer], states[layer]) for layer in compared):
        raise UserError(f"model type {kind!r}: its hidden states are not the outputs of its layers; {REMEDY}")
    if torch.equal(states[-1][0, 0], states[-1][1, 0]):
        raise UserError(f"model type {kind!r}: its first token does not attend to a later one; {REMEDY}")


def runs_unpadded(model: PreTrainedModel) -> bool:
    """Tells whether the model (after `install`) computes the same without its pads, by trying it."""
    if model.config._attn_implementation not in (IMPLEMENTATIONS["sdpa"], IMPLEMENTATIONS["eager"]):
        return False  # its mask function, or all of its attention, is not ours
    lengths, generator = (5, 2, 3), torch.Generator().manual_seed(0)
    low, high = 5, min(model.config.vocab_size, 1000)
    ids = torch.randint(low, high, (3, 5), generator=generator).to(model.device)
    real = torch.arange(5, device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    batch = Batch(ids, real.long(), None, Counts(), lengths=lengths)
    layers = layer_calls(model)
    everything = Wanted(hidden=frozenset(range(layers + 1)), attention=frozenset(range(1, layers + 1)))
    was_training = model.training
    try:
        with torch.no_grad():
            padded = capture(model.eval(), batch, everything)
            packed = capture(model, batch, everything, unpadded=True)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.03

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).float().norm() <= tolerance * b.float().norm())

    return all(same(packed.hidden[layer][0], state[real]) for layer, state in padded.hidden.items()) and all(
        same(of_packed[layer][0].transpose(0, 1), of_padded[layer].transpose(1, 2)[real])
        for of_packed, of_padded in ((packed.query, padded.query), (packed.key, padded.key))
        for layer in of_padded
    )
