"""Encoders as a user runs them, loaded and measured in turns: AutoModel, eager, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.errors import UserError, first_line, is_out_of_memory
from engine.hub.files import weight_files
from engine.jobs.execution import versions
from engine.jobs.measure.turns import Times, take_turns
from engine.models.hub import SavedModel, load_backbone
from engine.ranks.machine import device_name
from engine.records.columns import counted
from engine.records.comparison import Comparison, MeasuredEncoder

MIB = 2**20


def compare_encoders(
    models: Mapping[str, SavedModel],
    *,
    device: torch.device,
    seq_len: int,
    batch_sizes: Sequence[int],
    dtype: str,
    rounds: int,
    limit_s: float = math.inf,
) -> Comparison:
    """Loads the encoders, without pooler and heads, and measures them on the device, the first as what the others are
    compared with.

    models: by the names that they get. limit_s: seconds for each batch size after which no further round begins. Raises
    UserError for a model that cannot be read, and where memory runs out.
    """
    try:
        loaded = {name: _load(saved, getattr(torch, dtype), device) for name, saved in models.items()}
        times = [
            take_turns(
                {name: _forward(model, batch, seq_len) for name, model in loaded.items()},
                rounds,
                device,
                limit_s=limit_s,
            )
            for batch in batch_sizes
        ]
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        shapes = " and ".join(f"{batch} x {seq_len}" for batch in batch_sizes)
        raise UserError(
            f"out of memory at {shapes} tokens ({first_line(error)[:200]}); write smaller batch_sizes or seq_len, or "
            "measure fewer models"
        ) from None
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return Comparison(
        encoders=[_measured(name, models[name], model, times) for name, model in loaded.items()],
        batch_sizes=list(batch_sizes),
        seq_len=seq_len,
        dtype=dtype,
        rounds=[len(next(iter(by_name.values())).wall) for by_name in times],
        machine=f"{device_name(device)}{threads}; {versions()}",
    )


def _load(saved: SavedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = load_backbone(saved.path, key=saved.key, config=saved.config, dtype=dtype).eval()
    return model.to(device)


def _forward(model: PreTrainedModel, batch: int, seq_len: int) -> Callable[[], None]:
    """Returns a forward pass over random tokens, (batch, seq_len), without pads."""
    tokens = torch.randint(model.config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0))
    ids = tokens.to(model.device)
    mask = torch.ones_like(ids)

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=ids, attention_mask=mask)

    return forward


def _measured(
    name: str, saved: SavedModel, model: PreTrainedModel, times: Sequence[Mapping[str, Times]]
) -> MeasuredEncoder:
    tensors = [*model.parameters(), *model.buffers()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = next(iter(times[0]))
    return MeasuredEncoder(
        name=name,
        parameters=parameters,
        parameters_beside_embeddings=parameters
        - sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)),
        disk_mib=sum(file.stat().st_size for file in weight_files(saved.path, saved.key)) / MIB,
        memory_mib=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB,
        ms=[by_name[name].ms for by_name in times],
        speedup=[by_name[name].speedup_over(by_name[first]) for by_name in times],
    )
