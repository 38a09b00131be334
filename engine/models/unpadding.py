"""Forward passes of an encoder's layers without the pads of their batch: hidden states go before the first layer and
come back after the last, so that embeddings, positions and heads see padded batches as always.

The attention mask is what every layer of every encoder hands on to its attention function, also when a checkpointed
layer is run again in the backward pass. So a packed forward's mask is a list of the sequences' lengths (a tensor on the
CPU, which others may copy and detach), and whoever meets it knows: hooks of the layers, and our attention functions.
Rotary positions, which every layer is given anew, lose the pads with them.

A CPU keeps a few pads, behind the sequences, so that batches have few different numbers of rows: what is compiled or
allocated for one number serves the next batch (docs/benchmarks.md, "Memory of a long run"). No sequence attends to
them, and no loss looks at them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.kernels.segments import Segments, segments_of_lengths

NO_PADS, PADS_AT_END = -0x5EC5, -0x5EC6
"""First entries of a packed forward's mask."""


class Packing(NamedTuple):
    segments: Segments
    pad_at_end: bool
    """Whether the last layer's output gets its pads back, for heads that look at positions."""
    window: int | None = None
    """Tokens to each side that the layer attends to; None: all"""


_active: ContextVar[Packing | None] = ContextVar("mapdistill_packing", default=None)


@contextmanager
def packing(segments: Segments | None, *, pad_at_end: bool) -> Iterator[None]:
    """Makes forward passes inside run without pads; None: as they are."""
    token = _active.set(None if segments is None else Packing(segments, pad_at_end))
    try:
        yield
    finally:
        _active.reset(token)


def packed_mask(window: int | None) -> torch.Tensor | None:
    """Returns what stands in place of an attention mask, (3 + S,) int64: a mark, the window of the layers that get it
    (-1: none), the number of rows and S lengths. None outside of `packing`."""
    active = _active.get()
    if active is None:
        return None
    mark = PADS_AT_END if active.pad_at_end else NO_PADS
    near = -1 if window is None else window
    return torch.tensor([mark, near, active.segments.rows, *active.segments.lengths], dtype=torch.int64)


def packing_of(mask: Any) -> Packing | None:
    """Reads what `packed_mask` has written; None for anything else that a layer is given."""
    if not isinstance(mask, torch.Tensor) or (mask.dim(), mask.dtype, mask.device.type) != (1, torch.int64, "cpu"):
        return None
    mark, *numbers = mask.tolist() or [0]
    if mark not in (NO_PADS, PADS_AT_END):
        return None
    window, rows, *lengths = numbers
    segments = segments_of_lengths(tuple(lengths), rows)
    return Packing(segments, mark == PADS_AT_END, None if window == -1 else window)


def install_packing(layers: list[nn.Module]) -> None:
    """Adds the hooks to a model that has none yet. layers: in their order. Forwards outside of `packing` do not
    change."""
    layers[0].register_forward_pre_hook(_pack, with_kwargs=True)
    for layer in layers:
        if "position_embeddings" in inspect.signature(layer.forward).parameters:
            layer.register_forward_pre_hook(_pack_positions, with_kwargs=True)
    layers[-1].register_forward_hook(_pad, with_kwargs=True)


def _find_packing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packing | None:
    for value in (*args, *kwargs.values()):
        if (found := packing_of(value)) is not None:
            return found
    return None


def _pack(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    found = _find_packing(args, kwargs)
    if found is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if _is_packed(hidden, found.segments):  # the one module of a model that shares its layers
        return None
    hidden = found.segments.packed(hidden, 1)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _pack_positions(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Takes the pads out of cosines and sines, (B or 1, L, d) each, by which a layer rotates its queries and keys."""
    found = _find_packing(args, kwargs)
    if found is None or kwargs.get("position_embeddings") is None:
        return None
    positions = (x.expand(len(found.segments), -1, -1) for x in kwargs["position_embeddings"])
    return args, {**kwargs, "position_embeddings": tuple(found.segments.packed(x, 1) for x in positions)}


def _pad(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    found = _find_packing(args, kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    if found is None or not found.pad_at_end or not _is_packed(hidden, found.segments):
        return None
    hidden = found.segments.padded(hidden, 1)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _is_packed(hidden: torch.Tensor, segments: Segments) -> bool:
    return hidden.shape[:2] == (1, segments.rows)


def without_pads(hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Returns (1, T, D) hidden states, whether or not the pads have come back already. T: segments.rows."""
    return hidden if _is_packed(hidden, segments) else segments.packed(hidden, 1)


def group_mask(group: Segments, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Returns (S, 1, L, L) bool: which keys each query of these padded sequences attends to; None: to all."""
    real = group.mask_on(device)
    if window is None or window >= group.longest - 1:
        return None if real is None else real[:, None, None, :].expand(-1, -1, group.longest, -1)
    positions = torch.arange(group.longest, device=device)
    near = (positions[:, None] - positions[None, :]).abs() <= window
    if real is None:
        return near.expand(len(group), 1, -1, -1)
    return (real[:, None, None, :] & near) | ~real[
        :, None, :, None
    ]  # a pad far from the text would attend to nothing: NaN
