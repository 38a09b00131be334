"""Attention functions that hand Q, K and V to a recorder, registered with transformers' attention interface.

transformers calls whatever function `config._attn_implementation` names with the queries, keys and values of a layer.
Ours call the original one and, while a recorder is active in this thread, keep those tensors. So one function serves
every encoder that goes through the interface, without a table of module names, and `output_attentions` is never used.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.bert import modeling_bert

from engine.errors import UserError
from engine.kernels.segments import Segments
from engine.models.features import Features
from engine.models.unpadding import Packing, group_mask, packed_mask, packing_of
from engine.models.windows import window_of_mask

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None
if varlen_attn is not None and "scale" not in inspect.signature(varlen_attn).parameters:
    varlen_attn = None
VARLEN_FROM = (8, 0)
"""Least CUDA compute capability of its kernels."""
VARLEN_MULTIPLE, VARLEN_WIDEST = 8, 256
"""Head widths of its kernels: what they are multiples of (others are padded), and the largest."""

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

IMPLEMENTATIONS = {"sdpa": "mapdistill_sdpa", "eager": "mapdistill_eager", "flash_attention_2": "flash_attention_2"}
"""Backend -> name in the attention interface. flash_attention_2 keeps its own name, because transformers' function
reads it to find the library; the registered function is replaced by a recording one instead."""


EAGER_UP_TO = 256
"""Longest sequence, in tokens, at which eager forward + backward won in bf16 on a CPU: by 1.5 to 2.7 times at 64 and
128, by 1.2 to 1.4 at 256 without pads, at each head width that was measured (16, 32, 64); beyond, 16 lost."""


CHANGE_SCORES = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that make the probabilities others than softmax(scaling Q K^T)."""


class DeepEnough(Exception):
    """The end of a forward pass whose rest nobody needs."""


@dataclass
class Recorder:
    """What attention functions write to. A layer's number is the order of its attention call within one forward,
    which also holds for shared layers (ALBERT) and for modules that do not know their index (DistilBERT)."""

    layers: frozenset[int]
    values: bool
    features: Features = field(default_factory=Features)
    stop_after: int | None = None
    """Layer after whose recording the forward is left with DeepEnough."""
    calls: int = 0
    causal: bool = False

    def record(
        self, module: nn.Module, qkv: tuple[torch.Tensor, ...], scaling: float | None, more: Mapping[str, Any]
    ) -> None:
        """Keeps the tensors of one attention call, (B, H, L, d) each, if its layer is wanted.

        more: what else the model gives to its attention. Raises UserError for what no loss on scores knows of.
        """
        self.calls += 1
        self.causal |= bool(getattr(module, "is_causal", False))
        if self.calls not in self.layers:
            return
        changed = [name for name in CHANGE_SCORES if more.get(name) is not None]
        if changed:
            raise UserError(
                f"{type(module).__name__} computes its attention from more than queries and keys ({changed[0]}), which "
                "the losses on attention do not follow; set loss.attention, loss.attention_probs and loss.relation to 0"
            )
        query, key, value = qkv
        self.features.query[self.calls] = query
        self.features.key[self.calls] = key
        if self.values:
            self.features.value[self.calls] = value
        self.features.scaling[self.calls] = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if self.calls == self.stop_after:
            raise DeepEnough


# A context variable, so that the recomputation of a checkpointed layer (in the backward pass, after the recorder is
# gone, and on a GPU in another thread) and a second model in another thread never write into a running capture.
_active: ContextVar[Recorder | None] = ContextVar("mapdistill_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns softmax(scaling Q K^T + mask) V of (B, H, L, d) tensors as (B, L, H, d), and the probabilities (B, H, L,
    L).

    transformers scales the L x L scores; scaling Q instead is one pass less over them forward and one backward (a fifth
    of the time of a layer's attention on a CPU at length 128).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.matmul(scaled, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    probs = nn.functional.softmax(scores, dim=-1)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2).contiguous(), probs


@functools.cache
def _eager_of(model_module: str) -> AttentionFunction:
    """Returns the eager function of a model's own module where it computes something else (ModernBERT's softmax is in
    fp32), ours where that is the common one, which transformers copies from BERT into most encoders, or missing."""
    own: AttentionFunction | None = getattr(sys.modules[model_module], "eager_attention_forward", None)
    common = inspect.getsource(modeling_bert.eager_attention_forward)
    return eager_attention if own is None or inspect.getsource(own) == common else own


def _model_eager(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _eager_of(type(module).__module__)(module, *tensors, **kwargs)


def _with_recording(function: AttentionFunction) -> AttentionFunction:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        recorder = _active.get()
        if recorder is not None:
            recorder.record(module, (query, key, value), scaling, kwargs)
        packed = packing_of(attention_mask)
        if packed is not None:
            return packed_attention(function, module, (query, key, value), packed, scaling, **kwargs), None
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def packed_attention(
    function: AttentionFunction,
    module: nn.Module,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packed: Packing,
    scaling: float | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Returns (1, T, H, d) of packed (1, H, T, d) queries, keys and values, each sequence attending to itself, or to
    what is near in itself: by PyTorch's attention for sequences of any length where that runs, else by `function`, for
    groups of sequences that are padded together."""
    query = qkv[0]
    if dropout == 0.0 and packed.window is None and _has_varlen(query):
        return _varlen_attention(qkv, packed.segments, scaling)
    mixed_groups = []
    groups, back = packed.segments.groups_on(query.device)
    for group, at in groups:
        padded = (group.padded(x if at is None else x.index_select(2, at), 2) for x in qkv)
        mask = group_mask(group, packed.window, query.device)
        if mask is not None and function is _model_eager:  # adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        output, _ = function(module, *padded, mask, scaling=scaling, dropout=dropout, **kwargs)
        mixed_groups.append(group.packed(output, 1))
    joined = mixed_groups[0] if len(mixed_groups) == 1 else torch.cat(mixed_groups, dim=1)
    return joined if back is None else joined.index_select(1, back)


def _has_varlen(query: torch.Tensor) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= VARLEN_WIDEST
        and torch.cuda.get_device_capability(query.device) >= VARLEN_FROM
    )


def _varlen_attention(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], segments: Segments, scaling: float | None
) -> torch.Tensor:
    query = qkv[0]
    heads, width = query.shape[1], query.shape[-1]
    missing = -width % VARLEN_MULTIPLE  # its kernels refuse a width of 26, which zeros change nothing about
    every_head = (repeat_kv(x, heads // x.shape[1]) for x in qkv)
    tokens = (nn.functional.pad(x, (0, missing)).squeeze(0).transpose(0, 1) for x in every_head)
    bounds, longest = segments.bounds_on(query.device), segments.longest
    scale = width**-0.5 if scaling is None else scaling
    mixed: torch.Tensor = varlen_attn(*tokens, bounds, bounds, longest, longest, scale=scale)
    return mixed[..., :width].unsqueeze(0)


def _without_asking_the_device(mask_function: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """Returns a mask function that does not look whether the mask is all ones: a batch without pads comes without a
    mask here, so one that is there is needed."""
    # until transformers > 5.23: it looks, and waits for the device in every forward

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        if attention_mask is not None:
            packed = packed_mask(window_of_mask(**kwargs))
            if packed is not None:
                return packed
            kwargs["allow_is_bidirectional_skip"] = False
        return mask_function(*args, attention_mask=attention_mask, **kwargs)

    return mask


AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _with_recording(sdpa_attention_forward))
AttentionInterface.register(IMPLEMENTATIONS["eager"], _with_recording(_model_eager))
AttentionInterface.register(IMPLEMENTATIONS["flash_attention_2"], _with_recording(flash_attention_forward))
# Without a mask function of the same name transformers passes no mask at all, and pads would be attended to.
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], _without_asking_the_device(sdpa_mask))
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], _without_asking_the_device(eager_mask))


class Backend(NamedTuple):
    name: str
    reason: str


def resolve_backend(
    requested: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    head_dim: int,
    training: bool = True,
    key: str = "attention",
) -> Backend:
    """Returns the backend and why. `auto` follows the measured table in docs/benchmarks.md, section "Attention
    backend".

    dtype: what the matrices are multiplied in (the autocast type where there is one). training: whether a backward
    pass follows (a teacher has none). Raises UserError (naming `key`) for flash_attention_2 where it cannot run.
    """
    if requested == "flash_attention_2":
        _check_flash(device, dtype, key)
    if requested != "auto":
        return Backend(requested, f"{key}={requested}")
    if device.type != "cpu":
        return Backend("sdpa", f"auto: fused attention on {device.type}")
    if dtype not in (torch.bfloat16, torch.float32):
        return Backend("sdpa", f"auto: the default; {dtype} on a CPU was not measured")
    where = f"on a CPU in {str(dtype).removeprefix('torch.')}, length {seq_len}, head width {head_dim}"
    if not training:
        return Backend("sdpa", f"auto: measured faster than eager {where}, without a backward pass")
    if dtype == torch.bfloat16 and seq_len <= EAGER_UP_TO:
        return Backend("eager", f"auto: measured faster than sdpa {where} (its backward pass is slow there)")
    return Backend("sdpa", f"auto: eager was measured to have no clear advantage {where}")


def _check_flash(device: torch.device, dtype: torch.dtype, key: str) -> None:
    problem = ""
    if importlib.util.find_spec("flash_attn") is None:
        problem = "the package flash-attn is not installed"
    elif device.type != "cuda":
        problem = f"it needs a CUDA device, not {device.type}"
    elif dtype not in (torch.float16, torch.bfloat16):
        problem = f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if problem:
        raise UserError(f"{key}='flash_attention_2': {problem}; write auto or sdpa")
