"""Encoders as a user runs them, loaded and measured in turns: AutoModel, eager, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from engine.train.onnx_file import INPUTS, ONNX_FILE, open_session

MIB = 2**20
ONNX = " (ONNX)"
"""What stands behind a model's name in the column of its ONNX file."""


def compare_encoders(
    models: Mapping[str, SavedModel],
    *,
    device: torch.device,
    seq_len: int,
    batch_sizes: Sequence[int],
    dtype: str,
    rounds: int,
    limit_s: float = math.inf,
    with_onnx: bool = False,
) -> Comparison:
    """Loads the encoders, without pooler and heads, and measures them on the device, the first as what the others are
    compared with.

    models: by the names that they get. limit_s: seconds for each batch size after which no further round begins.
    with_onnx: whether the ONNX files in their folders are measured, too, behind each model: on a CPU in float32, where
    onnxruntime is installed. Raises UserError for a model that cannot be read, and where memory runs out.
    """
    try:
        loaded = {name: _load(saved, getattr(torch, dtype), device) for name, saved in models.items()}
        files = _onnx_files(models) if with_onnx and device.type == "cpu" and dtype == "float32" else {}
        sessions = {name: _session(path) for name, path in files.items()}
        times = [
            take_turns(
                _forward_passes(loaded, sessions, batch, seq_len),
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
    runtime = f", onnxruntime {version('onnxruntime')}" if files else ""
    return Comparison(
        encoders=_all_measured(models, loaded, files, times),
        batch_sizes=list(batch_sizes),
        seq_len=seq_len,
        dtype=dtype,
        rounds=[len(next(iter(by_name.values())).wall) for by_name in times],
        machine=f"{device_name(device)}{threads}; {versions()}{runtime}",
    )


def _load(saved: SavedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = load_backbone(saved.path, key=saved.key, config=saved.config, dtype=dtype).eval()
    return model.to(device)


def _onnx_files(models: Mapping[str, SavedModel]) -> dict[str, Path]:
    """Returns the ONNX files of the models that have one, by the models' names; none without onnxruntime."""
    if find_spec("onnxruntime") is None:
        return {}
    return {name: path for name, saved in models.items() if (path := Path(saved.path) / ONNX_FILE).is_file()}


def _forward_passes(
    loaded: Mapping[str, PreTrainedModel], sessions: Mapping[str, Any], batch: int, seq_len: int
) -> dict[str, Callable[[], Any]]:
    """Returns forward passes over random tokens, (batch, seq_len), without pads, of each model and, behind it, of its
    ONNX file."""
    passes: dict[str, Callable[[], Any]] = {}
    for name, model in loaded.items():
        tokens = torch.randint(model.config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0))
        passes[name] = _forward(model, tokens)
        if name in sessions:
            passes[name + ONNX] = _onnx_forward(sessions[name], tokens)
    return passes


def _forward(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], None]:
    ids = tokens.to(model.device)
    mask = torch.ones_like(ids)

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=ids, attention_mask=mask)

    return forward


def _session(path: Path) -> Any:
    """Returns what runs an ONNX file. Raises UserError for one with other inputs than an encoder's."""
    session = open_session(path)
    unknown = [one.name for one in session.get_inputs() if one.name not in INPUTS]
    if unknown:
        raise UserError(f"{path}: its inputs are not those of an encoder ({', '.join(unknown)}); export it again")
    return session


def _onnx_forward(session: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    values = dict(zip(INPUTS, (tokens, torch.ones_like(tokens), torch.zeros_like(tokens)), strict=True))
    feed = {one.name: values[one.name].numpy() for one in session.get_inputs()}
    return partial(session.run, None, feed)


def _all_measured(
    models: Mapping[str, SavedModel],
    loaded: Mapping[str, PreTrainedModel],
    files: Mapping[str, Path],
    times: Sequence[Mapping[str, Times]],
) -> list[MeasuredEncoder]:
    encoders = []
    for name, model in loaded.items():
        encoders.append(_measured(name, models[name], model, times))
        if name in files:
            size = files[name].stat().st_size / MIB
            encoders.append(
                replace(encoders[-1], name=name + ONNX, disk_mib=size, memory_mib=None, **_speed(name + ONNX, times))
            )
    return encoders


def _speed(name: str, times: Sequence[Mapping[str, Times]]) -> dict[str, Any]:
    first = next(iter(times[0]))
    return {
        "ms": [by_name[name].ms for by_name in times],
        "speedup": [by_name[name].speedup_over(by_name[first]) for by_name in times],
    }


def _measured(
    name: str, saved: SavedModel, model: PreTrainedModel, times: Sequence[Mapping[str, Times]]
) -> MeasuredEncoder:
    tensors = [*model.parameters(), *model.buffers()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return MeasuredEncoder(
        name=name,
        parameters=parameters,
        parameters_beside_embeddings=parameters
        - sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)),
        disk_mib=sum(file.stat().st_size for file in weight_files(saved.path, saved.key)) / MIB,
        memory_mib=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB,
        **_speed(name, times),
    )
