"""How this machine runs a job: device, DeepSpeed file, precision, attention backend, versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ValidationError

from engine.config.deepspeed import FOLDER, Execution, default_config_name, resolve_execution
from engine.config.distill import OptimConfig, TrainConfig
from engine.errors import UserError
from engine.models.apex import require_apex
from engine.models.attention import Backend, resolve_backend
from engine.models.shape import ModelShape
from engine.ranks import runtime


def compute_device() -> torch.device:
    """The kind of device that this job computes on."""
    return torch.device("cuda" if runtime.uses_gpu() else "cpu")


def plan_execution(deepspeed_config: str, train: TrainConfig, optim: OptimConfig) -> Execution:
    """How this machine executes it. Raises UserError for a DeepSpeed file or an optimizer that cannot work."""
    path = Path(deepspeed_config)
    if deepspeed_config == "auto":
        path = FOLDER / default_config_name(has_gpu=runtime.uses_gpu(), has_fast_bf16=runtime.has_fast_bf16())
    execution = resolve_execution(train, optim, path, runtime.launcher_world_size())
    check_zero_section(execution)
    check_precision(execution)
    if optim.name.startswith("apex_"):
        require_apex(optim.name)
    return execution


def check_zero_section(execution: Execution) -> None:
    """DeepSpeed would find these mistakes too, but only after both models are loaded, and with a traceback."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**execution.resolved["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UserError(f"{execution.source}: {key}={first['input']!r}: {first['msg']}") from None


def check_precision(execution: Execution) -> None:
    """DeepSpeed would refuse it too, but only after both models are loaded, and with a traceback."""
    if execution.precision == "float16" and not runtime.uses_gpu() and not runtime.has_fp16():
        raise UserError(
            f"{execution.source}: fp16 on a CPU needs AVX-512 FP16, which this processor lacks; use a bf16 or fp32 "
            "file such as ds_configs/zero0_bf16.json, or a GPU"
        )


def attention_backend(requested: str, dtype: str, shape: ModelShape, seq_len: int, *, trained: bool) -> Backend:
    return resolve_backend(
        requested,
        device=compute_device(),
        dtype=getattr(torch, dtype),
        seq_len=seq_len,
        head_dim=shape.width // shape.heads,
        training=trained,
        key="student.attention" if trained else "teacher.attention",
    )


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("mapdistill", "torch", "deepspeed", "transformers"))
