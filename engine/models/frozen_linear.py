"""Linear maps of a frozen model on a CPU: weights in the layout that the matrix products want, laid out once instead of
in every call, and maps of one input (queries, keys and values) as one product. In bf16 on AMX the teacher's products
are 1.2 to 2.6 times as fast (docs/benchmarks.md, "Teacher on a CPU")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.ranks.allocator import return_freed_memory

TOKENS_HINT = 1024
"""Tokens that the layout is chosen for; other numbers run as fast in it."""
LONG_FROM, MANY_FROM, ROWS_AT_ONCE = 2048, 1536, 256
"""Products over this many features or more, of fewer rows than that, leave one of two cores idle; cut into rows they do
not (oneDNN in PyTorch 2.13; 1024 x 3072 x 768: 3.4 ms instead of 5.1)."""


def can_pack(model: PreTrainedModel, device: torch.device) -> bool:
    """Tells whether the layout exists here: bf16 on a CPU that multiplies it natively, with oneDNN."""
    return (
        device.type == "cpu"
        and model.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class FrozenLinear(nn.Module):
    """One product for several linear maps of the same input. It has no parameters: nothing trains or saves it."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = [one.out_features for one in maps]
        weight = torch.cat([one.weight.detach() for one in maps])
        biases: list[torch.Tensor] = [
            torch.zeros(one.out_features, dtype=weight.dtype) if one.bias is None else one.bias for one in maps
        ]
        self._bias = torch.cat(biases).detach() if any(one.bias is not None for one in maps) else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS_HINT)
        self.in_features = weight.shape[1]
        self.bytes = sum(x.numel() * x.element_size() for x in (weight, self._bias) if x is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.in_features >= LONG_FROM and ROWS_AT_ONCE < len(rows) < MANY_FROM:
            out = torch.cat([self._product(part) for part in rows.split(ROWS_AT_ONCE)])
        else:
            out = self._product(rows)
        return out.view(*x.shape[:-1], -1)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out


class _Shared:
    """The product of maps that are called one after the other with one input."""

    def __init__(self, linear: FrozenLinear) -> None:
        self._linear = linear
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output(self, number: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x or number not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self._linear(x).split(self._linear.widths, dim=-1)))
        out = self._outputs.pop(number)
        if not self._outputs:  # nothing is kept beyond its use
            self._input = None
        return out


class _Part(nn.Module):
    """The module in the place of one of these maps."""

    def __init__(self, shared: _Shared, number: int) -> None:
        super().__init__()
        self._shared, self._number = shared, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared.output(self._number, x)


def freeze_linears(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[FrozenLinear]:
    """Replaces the linear maps inside `layers`, those with one input by one product, and returns what they became.

    A forward of 4 tokens shows which ones share an input.
    """
    inside = {id(m): m for layer in layers for m in layer.modules() if type(m) is nn.Linear}
    parents = {
        id(child): (parent, name)
        for layer in layers
        for parent in layer.modules()
        for name, child in parent.named_children()
    }
    made, groups = [], _by_input(model, list(inside.values()))
    inside.clear()
    while groups:
        group = groups.pop(0)  # not kept, so that its memory serves the next
        linear = FrozenLinear(group)
        made.append(linear)
        shared = _Shared(linear)
        for number, one in enumerate(group):
            parent, name = parents[id(one)]
            setattr(parent, name, (linear if len(group) == 1 else _Part(shared, number)).eval())
        del group
    return_freed_memory()
    return made


def _by_input(model: PreTrainedModel, linears: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Returns the maps in the order of their calls, neighbours with the same input together."""
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, args[0]))

    handles = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[nn.Linear]] = []
    seen: set[int] = set()
    last: torch.Tensor | None = None
    for linear, given in calls:
        if id(linear) in seen:  # a shared layer, called again
            last = None
            continue
        seen.add(id(linear))
        if given is last:
            groups[-1].append(linear)
        else:
            groups.append([linear])
        last = given
    return groups
