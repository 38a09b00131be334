"""How this machine runs a job: device, DeepSpeed file, precision, attention backend, versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import ValidationError

from engine import __version__
from engine.config.deepspeed import Execution, default_config_name, resolve_execution
from engine.config.deepspeed_file import FOLDER, NAMES, REMEDIES, TRACKERS, section
from engine.config.distill import OptimConfig, TrainConfig
from engine.config.places import shipped_file
from engine.errors import UserError
from engine.models.apex import require_apex
from engine.models.attention import Backend, resolve_backend
from engine.models.shape import ModelShape
from engine.ranks import extension_builds
from engine.ranks.hosts.agent import COMPARED
from engine.ranks.machine import device_name
from engine.ranks.runtime import has_fast_bf16, has_fp16, launcher_world_size, name_accelerator, uses_gpu
from engine.records.columns import counted


def compute_device() -> torch.device:
    """Returns the kind of device that this job computes on, without a number."""
    return torch.device("cuda" if uses_gpu() else "cpu")


def plan_execution(deepspeed_config: str, train: TrainConfig, optim: OptimConfig) -> Execution:
    """Returns how this machine executes a job. Raises UserError for a DeepSpeed file or an optimizer that cannot
    work."""
    name_accelerator()
    extension_builds.require_operators()
    path = shipped_file(deepspeed_config)
    if deepspeed_config == "auto":
        path = FOLDER / default_config_name(has_gpu=uses_gpu(), has_fast_bf16=has_fast_bf16())
    execution = resolve_execution(train, optim, path, launcher_world_size(), refused_by_deepspeed)
    check_precision(execution)
    _require_packages(execution)
    if optim.name.startswith("apex_"):
        require_apex(optim.name)
    return execution


def _require_packages(execution: Execution) -> None:
    """Raises UserError for a tracker whose Python package is missing."""
    for name in execution.trackers:
        package = TRACKERS[name]
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"{execution.source}: {name}.enabled=true, but the Python package {package!r} is missing; "
                f"pip install {package}, or write false there"
            )


def refused_by_deepspeed(ds: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields key and fault of the values that DeepSpeed's own classes refuse. It would find them too, but only after
    both models are loaded, and with a traceback."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    classes = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }
    for name, kind in classes.items():
        known = {key: value for key, value in section(ds, name).items() if f"{name}.{key}" not in REMEDIES}
        try:
            kind(**known)
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join(str(part) for part in (name, *fault["loc"]))
                given = f"={json.dumps(fault['input'], default=repr)}" if fault["loc"] else ""
                if fault["type"] != "extra_forbidden" or name not in NAMES:  # names were looked at already
                    yield key, f"{key}{given}: {fault['msg']}"


def check_precision(execution: Execution) -> None:
    """Raises UserError for fp16 on a processor that has none. DeepSpeed would refuse it too, but only after both models
    are loaded, and with a traceback."""
    if execution.precision == "float16" and not uses_gpu() and not has_fp16():
        raise UserError(
            f"{execution.source}: fp16 on a CPU needs AVX-512 FP16, which this processor lacks; use a bf16 or fp32 "
            "file such as ds_configs/zero0_bf16.json, or a GPU"
        )


def attention_backend(requested: str, dtype: str, shape: ModelShape, seq_len: int, *, key: str) -> Backend:
    """Returns what computes the attention of a model. key: name of the setting; a teacher is not trained.

    Raises UserError for a choice that this machine or model does not have."""
    if shape.own_attention is not None:
        reason = f"model type {shape.own_attention.model_type!r} computes its attention itself"
        if requested != "auto":
            raise UserError(f"{key}={requested!r}: {reason}, without transformers' attention interface; write auto")
        return Backend("own", reason)
    return resolve_backend(
        requested,
        device=compute_device(),
        dtype=getattr(torch, dtype),
        seq_len=seq_len,
        head_dim=shape.width // shape.heads,
        training=key != "teacher.attention",
        key=key,
    )


def versions() -> str:
    """Returns the versions of this library and of those that all hosts must agree on, for a banner."""
    return ", ".join([f"mapdistill {__version__}", *(f"{name} {version(name)}" for name in COMPARED)])


def hardware(execution: Execution) -> str:
    """Returns ranks, device, precision and ZeRO stage of a job, for a model card."""
    device = compute_device()
    threads = f" of {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    ranks = f"{counted(execution.world_size, 'rank')}{threads} on {device_name(device)}"
    return f"{ranks}, {execution.precision}, ZeRO stage {execution.zero_stage}"
