"""How a machine executes a run: one DeepSpeed JSON of ds_configs/, with the values that the run config owns filled in.

No value has two owners. The run config owns batch, clipping, optimizer and schedule (`"auto"` or absent in the JSON);
the JSON owns precision, ZeRO stage, offload and micro batch. Two different values are an error. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.deepspeed_file import TRACKERS, ZERO, Check, load_ds_config, section
from engine.config.distill import OptimConfig, TrainConfig
from engine.errors import UserError

OFFLOAD_NEEDS_STAGE = {"offload_optimizer": 1, "offload_param": 3}
LAYOUT_KEYS = ("round_robin_gradients", "sub_group_size")
AUTO_MICRO_BATCH_LIMIT = 64
"""`train_micro_batch_size_per_gpu: "auto"` takes the largest divisor of a rank's share up to this many sequences."""
LARGEST_NAMED = 1024
"""Micro batches up to which the possible ones are named."""


@dataclass(frozen=True)
class Execution:
    """The resolved DeepSpeed configuration and what it says, in plain values."""

    source: str
    resolved: dict[str, Any]
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int
    precision: str
    """float32, bfloat16 or float16: the dtype of the student's weights in forward and backward."""
    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    trackers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the services that are sent a run's curves, by name. They are not in `resolved`: DeepSpeed's engine
    would send points of its own against samples, and a service's key would be copied into the run directory."""

    @property
    def facts(self) -> dict[str, Any]:
        """What shapes a sharded checkpoint, and what a record says of an execution."""
        return {"world_size": self.world_size, "zero_stage": self.zero_stage, "precision": self.precision}

    @property
    def layout(self) -> dict[str, Any]:
        """What, beside ranks and stage, decides which element lies where in a shard."""
        return {key: section(self.resolved, ZERO).get(key) for key in LAYOUT_KEYS}


def default_config_name(*, has_gpu: bool, has_fast_bf16: bool) -> str:
    if has_gpu:
        return "zero1_bf16.json"
    return "zero0_bf16.json" if has_fast_bf16 else "zero0_fp32.json"


def fill_auto(ds: dict[str, Any], owned: dict[str, object], source: str) -> None:
    """Writes owned values over `"auto"`; another value in their place is an error."""
    for dotted, value in owned.items():
        *parents, leaf = dotted.split(".")
        node = ds
        for key in parents:
            node = node.setdefault(key, {})
        if node.setdefault(leaf, "auto") not in ("auto", value):
            raise UserError(f'{source}: {dotted}={node[leaf]!r}, but the run config says {value!r}; write "auto"')
        node[leaf] = value


def _micro_batch(ds: dict[str, Any], global_batch: int, world_size: int, source: str) -> int:
    if global_batch % world_size:
        lower = max(world_size, global_batch // world_size * world_size)
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by {world_size} ranks; use e.g. {lower}, or, to "
            "continue a run, a number of ranks that divides it"
        )
    share = global_batch // world_size
    value: int | str = ds.get("train_micro_batch_size_per_gpu", "auto")
    if isinstance(value, str):  # "auto"
        return max(d for d in range(1, min(share, AUTO_MICRO_BATCH_LIMIT) + 1) if share % d == 0)
    if value < 1:
        raise UserError(f'{source}: train_micro_batch_size_per_gpu={value!r} must be a whole number >= 1 or "auto"')
    if share % value:
        divisors = [d for d in range(1, min(share, LARGEST_NAMED) + 1) if share % d == 0]
        raise UserError(
            f"{source}: train_micro_batch_size_per_gpu={value} does not divide a rank's share of the global batch "
            f'({global_batch} / {world_size} ranks = {share}); use one of {divisors} or "auto"'
        )
    return value


def _enabled(ds: dict[str, Any], precision: str) -> bool:
    return section(ds, precision).get("enabled", False) is True


def _offload_device(ds: dict[str, Any], name: str) -> Any:
    return section(ds, ZERO, name).get("device", "none")


def _contradictions(ds: dict[str, Any], train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields what does not go together, or not with the run config: key and fault."""
    for name in ("bf16", "fp16", *TRACKERS):
        if name in ds and "enabled" not in section(ds, name):
            yield name, f"{name} has no effect without enabled; write it, true or false"
    if _enabled(ds, "bf16") and _enabled(ds, "fp16"):
        yield "fp16.enabled", "bf16 and fp16 are both enabled; choose one"
    if _enabled(ds, "bf16") and train.skip_bad_steps and not section(ds, "bf16").get("check_grad_overflow", True):
        what = "DeepSpeed would not notice the steps to leave out; remove that key"
        key = "bf16.check_grad_overflow"
        yield key, f"{key}=false with train.skip_bad_steps={train.skip_bad_steps}: {what}"
    every = ds.get("steps_per_print", 1)
    if isinstance(every, int) and every < 1:
        what = "must be at least 1; remove it to turn off DeepSpeed's own lines"
        yield "steps_per_print", f"steps_per_print={every} {what}"
    stage = section(ds, ZERO).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"{ZERO}.stage", f"{ZERO}.stage={stage!r} must be 0, 1, 2 or 3"
        return
    if stage == 0 and _enabled(ds, "fp16"):
        what = "DeepSpeed's stage 0 does not scale the loss; use ds_configs/zero1_fp16.json, or bf16"
        yield f"{ZERO}.stage", f"fp16 needs ZeRO stage 1 or higher: {what}"
    for name, needed in OFFLOAD_NEEDS_STAGE.items():
        device = _offload_device(ds, name)
        if device not in ("none", "cpu"):
            what = "must be none or cpu (checkpoints would lack the part on an NVMe disk)"
            yield f"{ZERO}.{name}.device", f"{name}.device={device!r} {what}"
        elif device == "cpu" and stage < needed:
            yield f"{ZERO}.{name}", f"{name} needs ZeRO stage {needed} or higher, this file has {stage}"


def resolve_execution(
    train: TrainConfig, optim: OptimConfig, path: Path, world_size: int, check: Check = lambda _: ()
) -> Execution:
    """Loads `path` and fills in what the run config owns, for `world_size` ranks. check: as for load_ds_config. Raises
    UserError."""
    ds, source = load_ds_config(path, lambda values: _contradictions(values, train), check), str(path)
    stage = ds.setdefault(ZERO, {"stage": 0}).get("stage", 0)
    micro = _micro_batch(ds, train.global_batch, world_size, source)
    accumulation = train.global_batch // (micro * world_size)
    ds["train_micro_batch_size_per_gpu"] = micro
    owned: dict[str, object] = {
        "train_batch_size": train.global_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
    }
    fill_auto(ds, owned, source)
    trackers = {name: values for name in TRACKERS if (values := ds.pop(name, {})).get("enabled")}
    ds.setdefault("steps_per_print", 1_000_000_000)  # the monitor prints; DeepSpeed's own line would double it
    offload = {name: _offload_device(ds, name) == "cpu" for name in OFFLOAD_NEEDS_STAGE}
    if optim.name.endswith("lamb") and stage > 0:
        raise UserError(
            f"optim.name={optim.name!r} with ZeRO stage {stage} ({source}): the trust ratio needs whole "
            "tensors, and ZeRO cuts them into flat shards; use a stage 0 file such as ds_configs/zero0_bf16.json, or "
            "optim.name=adamw"
        )
    if any(offload.values()) and optim.name != "adamw":
        raise UserError(f"optim.name={optim.name!r} with offload ({source}): only adamw (DeepSpeedCPUAdam) works there")
    if optim.name.startswith("apex"):
        ds["zero_allow_untested_optimizer"] = True
    return Execution(
        source=source,
        resolved=ds,
        world_size=world_size,
        micro_batch_size=micro,
        grad_accum_steps=accumulation,
        precision="bfloat16" if _enabled(ds, "bf16") else "float16" if _enabled(ds, "fp16") else "float32",
        zero_stage=stage,
        offload_optimizer=offload["offload_optimizer"],
        offload_param=offload["offload_param"],
        trackers=trackers,
    )
