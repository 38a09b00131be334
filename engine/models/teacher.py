"""The frozen teacher: loaded only as deep as a loss needs, run without gradients, whole or sharded over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.data.batch import Batch
from engine.models.capture import capture, layer_modules
from engine.models.features import Features, Wanted
from engine.models.frozen_linear import FrozenLinear, can_pack, freeze_linears
from engine.models.hub import Head, SavedModel, load_backbone, shape_of, skeleton
from engine.models.install import install, runs_unpadded
from engine.models.shape import ModelShape, forward_flops_per_token

Shard = Callable[[PreTrainedModel, torch.dtype, torch.device], nn.Module]
"""Spreads a frozen model over the ranks; returns what runs its forward."""


class FrozenTeacher:  # deliberately not an nn.Module: DeepSpeed must not shard, train or save it with the student
    """A frozen model that is called with a batch and returns the features that `wanted` names. Create it with
    `load`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        wanted: Wanted,
        full_config: PretrainedConfig,
        device: torch.device,
        shard: Shard | None = None,
        unpadded: bool = False,
    ) -> None:
        self.shape: ModelShape = shape_of(full_config, wanted.logits)
        """Sizes of the whole teacher, however few of its layers are loaded."""
        self.wanted = wanted
        self.parameters_count = _count(model)
        """Parameters that are loaded (over all ranks)."""
        self.full_parameters_count = _count(skeleton(full_config, "mlm" if wanted.logits else "none"))
        """Parameters of the whole teacher."""
        self.layers_loaded = shape_of(model.config, wanted.logits).layers
        # When the last hidden state is wanted the forward must reach its end, where some models have one more norm.
        # ZeRO-3 releases a module's weights in a hook after it, so there the forward always runs to the end.
        within = wanted.last_attention
        self._stop_early = (
            shard is None and not wanted.whole and (wanted.deepest < self.shape.layers or within is not None)
        )
        self.layers_run = (wanted.deepest if within is None else within - 1) if self._stop_early else self.layers_loaded
        """Number of whole layers that run; after them it may still compute queries, keys and values."""
        run = replace(self.shape, layers=self.layers_run)
        projections = 6.0 * self.shape.width**2 if self._stop_early and within is not None else 0.0
        # before sharding, which empties the weights
        self._body_flops = forward_flops_per_token(model, run, 0, head_share=0.0) + projections
        self._head_flops = forward_flops_per_token(model, run, 0) + projections - self._body_flops
        self._model = model.eval().requires_grad_(False)
        if shard is None:
            model.to(device)  # type: ignore[arg-type]
        self.unpadded = unpadded and runs_unpadded(model)
        self._forward: nn.Module | None = None if shard is None else shard(model, model.dtype, device)
        self._frozen: list[FrozenLinear] = []
        if shard is None and can_pack(model, device):
            self._frozen = freeze_linears(model, layer_modules(model))

    @classmethod
    def load(
        cls,
        saved: SavedModel,
        *,
        wanted: Wanted,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        shard: Shard | None = None,
        unpadded: bool = False,
    ) -> FrozenTeacher:
        """Reads the weights of a model; with `wanted.logits` of all layers and the MLM head, which it then has.

        backend: as resolved by `resolve_backend`. unpadded: run padded batches without their pads if the model can; the
        features then lack them too. shard: collective, on every rank of the running group; each rank reads the whole
        (truncated) model into host memory, and its device never holds more than its share.
        """
        config = saved.config
        layers = shape_of(config, wanted.logits).layers
        assert wanted.deepest <= layers, f"layer {wanted.deepest} of a teacher with {layers} layers is wanted"
        shallow = config if wanted.logits else truncated_config(config, wanted.deepest)
        head: Head = "mlm" if wanted.logits else "none"
        model = load_backbone(saved.path, key=saved.key, config=shallow, head=head, dtype=dtype)
        install(model, backend)
        return cls(model, wanted=wanted, full_config=config, device=device, shard=shard, unpadded=unpadded)

    @torch.no_grad()  # not inference_mode: the losses save these tensors for their backward pass
    def __call__(self, batch: Batch) -> Features:
        if any(module.training for module in self._model.modules()):
            raise RuntimeError("the teacher is in train mode (dropout would change its targets); call .eval() on it")
        if self.wanted == Wanted():  # every loss that needs a teacher is off or maps no layer
            return Features()
        return capture(
            self._model,
            batch,
            self.wanted,
            forward=self._forward,
            stop_early=self._stop_early,
            unpadded=self.unpadded,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def flops_per_token(self, seq_len: int, *, head_share: float = 1.0) -> float:
        """Returns the analytic FLOPs of one forward per token; see `forward_flops_per_token`. Only the layers that run
        count."""
        return self._body_flops + head_share * self._head_flops + 4.0 * seq_len * self.shape.width * self.layers_run

    def resident_bytes(self) -> int:
        """Returns the bytes of parameters that this rank holds between forwards."""
        held = (getattr(p, "ds_tensor", None) for p in self._model.parameters())
        shards = sum(t.numel() * t.element_size() for t in held if t is not None and t.numel())
        packed = sum(linear.bytes for linear in self._frozen)
        return shards + packed + sum(p.numel() * p.element_size() for p in self._model.parameters())


def truncated_config(config: PretrainedConfig, deepest: int) -> PretrainedConfig:
    """Returns the configuration of the first `deepest` layers (at least one): the others are then not even loaded.

    The result says `tie_last_hidden_states=False`: its last hidden state is an inner one of the whole model, before
    any final norm. Unchanged where the number of layers decides what a layer is (ALBERT with several groups).
    """
    inner = getattr(config, "inner_group_num", 1)
    keep = max(1, -(-deepest // inner))
    if keep >= config.num_hidden_layers or getattr(config, "num_hidden_groups", 1) > 1:
        return config
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = keep
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = list(shallow.layer_types)[:keep]
    shallow.tie_last_hidden_states = False
    return shallow


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
