"""The sizes of an encoder that checks and losses need before any weight is loaded, and the cost of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from engine.models.capture import layer_modules
from engine.models.own_attention import OwnAttention


@dataclass(frozen=True)
class ModelShape:
    layers: int
    width: int
    """Size of the hidden states."""
    heads: int
    """Number of query heads."""
    vocab: int
    has_mlm_head: bool
    windows: tuple[int | None, ...] = ()
    """How many tokens to each side each layer attends to, None: to all; empty: all layers to all."""
    own_attention: OwnAttention | None = None
    """Set for a model that computes its attention itself, without transformers' attention interface."""

    def window(self, layer: int) -> int | None:
        """Returns the window of a layer, counted from 1."""
        return self.windows[layer - 1] if self.windows else None


def forward_flops_per_token(
    model: PreTrainedModel, shape: ModelShape, seq_len: int, *, head_share: float = 1.0
) -> float:
    """Returns the FLOPs of one forward per token at `seq_len` tokens per sequence, an addition and a multiplication
    counted as two: 2 for each weight of a Linear layer (once for each call: ALBERT shares its layers), plus 4 * seq_len
    * width per layer for Q K^T and the weighted sum of V. Norms, softmax and look-ups are left out; sliding windows
    count in full. `shape.layers`: the layers that the model runs. head_share: the share of tokens that go through the
    MLM head. Call it before ZeRO-3 shards the weights: their sizes are 0 afterwards.
    """
    body = {id(module) for module in model.base_model.modules()}
    modules = layer_modules(model)
    inside = {id(m) for layer in modules for m in layer.modules()}
    calls = shape.layers / len(modules)  # all layer modules have one shape
    linear = sum(
        2.0 * module.weight.numel() * (calls if id(module) in inside else 1.0 if id(module) in body else head_share)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    return linear + 4.0 * seq_len * shape.width * shape.layers
