"""Linear maps from the student's width to the teacher's: trained with the student, never exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from engine.config.distill import LossConfig
from engine.errors import UserError
from engine.kernels.choice import Kernels
from engine.kernels.inputs import HiddenPairs
from engine.models.moments import LinearMap

PROJECTIONS_FILE = "projections.safetensors"
"""Name of the file beside an exported student that has them."""
EMBEDDINGS = 0
"""Index of the embedding output among the hidden states."""


def check_projection(kind: str | None, *, student_width: int, teacher_width: int) -> None:
    """Raises UserError when `loss.projection` cannot join the two widths."""
    if kind == "identity" and student_width != teacher_width:
        raise UserError(
            f"loss.projection='identity' needs equal widths, but the student has {student_width} and the teacher "
            f"{teacher_width}: set student.hidden_size={teacher_width}, or loss.projection=shared"
        )


def linear_name(kind: str, layer: int) -> str:
    """Returns the name of the linear map that serves hidden state `layer` (0 = embeddings)."""
    if kind == "single":
        return "all"
    if layer == EMBEDDINGS:
        return "embedding"
    return f"layer_{layer}" if kind == "per_layer" else "layers"


UsesWeights = Callable[[torch.Tensor, torch.Tensor | None], Any]


class _Projection(nn.Linear):
    """A linear map that is initialised inside its constructor: under ZeRO-3 the weight is sharded when that returns."""

    def reset_parameters(self) -> None:
        # Variance 1 / fan-in (LeCun et al. 1998, Efficient BackProp): a hidden state keeps its root mean square
        # through the map whatever the two widths are; BERT's fixed 0.02 would shrink one of width 312 to a third.
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor | UsesWeights) -> Any:
        """Returns the (…, D_t) projection of a hidden state (…, D_s); for a function, what that makes of weight and
        bias, which ZeRO-3 gathers for the time of this call."""
        if callable(hidden) and not isinstance(hidden, torch.Tensor):
            return hidden(self.weight, self.bias)
        # A 16-bit hidden state meets a float32 weight when only the projections keep full precision.
        return super().forward(hidden.to(self.weight.dtype))


class Projections(nn.Module):
    """`projections(layer, hidden)`: (B, L, student_width) -> (B, L, teacher_width) for hidden state `layer`.

    Holds only what `layers` (LossSet.projected_layers; 0 = embeddings) uses: a parameter that no loss reaches would
    have no gradient. Maps are created in a fixed order, so the global torch seed determines them.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        student_width: int,
        teacher_width: int,
        layers: Iterable[int],
        same_space: bool = False,
    ) -> None:
        """same_space: whether the student's states start as the teacher's (LossConfig.projection_kind)."""
        super().__init__()
        self.kind, self._width = config.projection_kind(same_space=same_space), student_width
        check_projection(self.kind, student_width=student_width, teacher_width=teacher_width)
        self.layers = frozenset(layers)
        self.linears = nn.ModuleDict()
        self.trained: frozenset[str] = frozenset()
        """Names of the maps that were trained before."""
        if self.kind == "identity":
            return
        for layer in sorted(self.layers):
            name = linear_name(self.kind, layer)
            if name not in self.linears:
                self.linears[name] = _Projection(student_width, teacher_width, bias=config.resolved_projection_bias)

    def _linear(self, layer: int) -> nn.Module | None:
        """Returns the map of hidden state `layer`; None for the identity. Raises KeyError for a layer that has none."""
        if layer not in self.layers:
            raise KeyError(f"no projection was made for hidden state {layer}, only for {sorted(self.layers)}")
        return None if self.kind == "identity" else self.linears[linear_name(self.kind, layer)]

    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        linear = self._linear(layer)
        return hidden if linear is None else linear(hidden)

    @property
    def has_bias(self) -> bool:
        return any(linear.bias is not None for linear in self.linears.values())

    def as_map(self, layer: int) -> LinearMap:
        """Returns the map of hidden state `layer` as it is now, before DeepSpeed shards it."""
        linear = self._linear(layer)
        if linear is None:
            return LinearMap(torch.eye(self._width, dtype=torch.float64), None)
        assert isinstance(linear, nn.Linear)
        bias = None if linear.bias is None else linear.bias.detach().double()
        return LinearMap(linear.weight.detach().double(), bias)

    @torch.no_grad()
    def start_from(self, maps: Mapping[int, LinearMap]) -> None:
        """Overwrites the map of each of these hidden states; before DeepSpeed shards it."""
        for layer, found in maps.items():
            linear = self._linear(layer)
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(found.weight)
            if found.bias is not None:
                linear.bias.copy_(found.bias)

    @torch.no_grad()
    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the maps that `state`, the state of other projections, has in the same shape; before DeepSpeed
        shards them."""
        own = self.state_dict()
        fits = {
            name
            for name in self.linears
            if (keys := [key for key in own if key.startswith(f"linears.{name}.")])
            and all(key in state and state[key].shape == own[key].shape for key in keys)
        }
        for key, tensor in own.items():
            if key.split(".")[1] in fits:
                tensor.copy_(state[key])
        self.trained = frozenset(fits)

    def was_trained(self, layer: int) -> bool:
        """Returns whether the map of hidden state `layer` was trained before."""
        return self.kind != "identity" and linear_name(self.kind, layer) in self.trained

    def sharing(self, layers: Mapping[str, int]) -> list[list[str]]:
        """Returns the names of hidden states, grouped by the map that they share. layers: name -> hidden state."""
        groups: dict[str, list[str]] = {}
        for name, layer in layers.items():
            groups.setdefault("" if self.kind == "identity" else linear_name(self.kind, layer), []).append(name)
        return list(groups.values())

    def mse(self, layer: int, kernels: Kernels, inputs: HiddenPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns Kernels.hidden_mse through the map that hidden state `layer` shares with all states of `inputs`."""

        def loss(weight: torch.Tensor | None, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            return kernels.hidden_mse(inputs._replace(weight=weight, bias=bias))

        linear = self._linear(layer)
        result: tuple[torch.Tensor, torch.Tensor] = loss(None, None) if linear is None else linear(loss)
        return result
