"""Analytic cost of a forward pass, for the achieved TFLOP/s that a run reports."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from engine.models.capture import layer_modules
from engine.models.shape import ModelShape


def forward_flops_per_token(
    model: PreTrainedModel, shape: ModelShape, seq_len: int, *, head_share: float = 1.0
) -> float:
    """FLOPs of one forward per token at `seq_len` tokens per sequence, an addition and a multiplication counted as two:
    2 for each weight of a Linear layer (once for each call: ALBERT shares its layers), plus 4 * seq_len * width per
    layer for Q K^T and the weighted sum of V. Norms, softmax and look-ups are left out; sliding windows count in full.
    `shape.layers`: the layers that the model runs. head_share: the share of tokens that go through the MLM head.
    Call it before ZeRO-3 shards the weights: their sizes are 0 afterwards.
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
