"""How a machine executes a run: one DeepSpeed JSON of ds_configs/, with the values that the run config owns filled in.

No value has two owners. The run config owns batch, clipping, optimizer and schedule (`"auto"` or absent in the JSON);
the JSON owns precision, ZeRO stage, offload and micro batch. Two different values are an error. No torch here.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.distill import OptimConfig, TrainConfig
from engine.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"

# DeepSpeed ignores a top-level key that it does not know, so that a typing error silently trains something else.
KNOWN_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "bf16",
        "fp16",
        "data_types",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "sparse_gradients",
        "wall_clock_breakdown",
        "dump_state",
        "memory_breakdown",
        "activation_checkpointing",
        "comms_logger",
        "flops_profiler",
        "aio",
        "checkpoint",
        "seq_parallel",
        "communication_data_type",
        "torch_autocast",
        "compile",
        "timers",
        "graph_harvesting",
        "hybrid_engine",
    ]
)
OWNED_ELSEWHERE = {
    "optimizer": "optim.* and train.lr of the run config own the optimizer",
    "scheduler": "train.schedule and train.warmup_steps of the run config own the schedule",
    "tensorboard": "engine/train/monitor.py owns the TensorBoard writer",
    "wandb": "engine/train/monitor.py owns the logs",
    "csv_monitor": "records.jsonl holds the same numbers",
}
CHECKPOINT_KEYS = frozenset(["tag_validation", "parallel_write"])
"""Of the section `checkpoint`. Storage is checkpoint.storage's, universal checkpoints are made and loaded as needed,
and other writers (asynchronous ones) would be hashed before they have written."""
OFFLOAD_NEEDS_STAGE = {"offload_optimizer": 1, "offload_param": 3}
LAYOUT_KEYS = ("round_robin_gradients", "sub_group_size")
AUTO_MICRO_BATCH_LIMIT = 64
"""`train_micro_batch_size_per_gpu: "auto"` takes the largest divisor of a rank's share up to this many sequences."""


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

    @property
    def facts(self) -> dict[str, Any]:
        """What shapes a sharded checkpoint, and what a record says of an execution."""
        return {"world_size": self.world_size, "zero_stage": self.zero_stage, "precision": self.precision}

    @property
    def layout(self) -> dict[str, Any]:
        """What, beside ranks and stage, decides which element lies where in a shard."""
        zero = self.resolved.get("zero_optimization", {})
        return {key: zero.get(key) for key in LAYOUT_KEYS}


def default_config_name(*, has_gpu: bool, has_fast_bf16: bool) -> str:
    if has_gpu:
        return "zero1_bf16.json"
    return "zero0_bf16.json" if has_fast_bf16 else "zero0_fp32.json"


def load_ds_config(path: Path) -> dict[str, Any]:
    """Reads and checks the JSON. Raises UserError naming the file and the key."""
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in FOLDER.glob("*.json")))
        raise UserError(f"deepspeed_config={str(path)!r}: no such file; shipped in {FOLDER}: {shipped}")
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(ds, dict):
        raise UserError(f"{path}: the top level must be a JSON object")
    for key in ds:
        if key in OWNED_ELSEWHERE:
            raise UserError(f"{path}: remove the section {key!r}: {OWNED_ELSEWHERE[key]}")
        if key not in KNOWN_KEYS:
            close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{path}: unknown key {key!r}{hint} (DeepSpeed would ignore it silently)")
    section = ds.get("checkpoint", {})
    if not isinstance(section, dict) or not section.keys() <= CHECKPOINT_KEYS:
        raise UserError(
            f"{path}: checkpoint={section!r}: only {' and '.join(sorted(CHECKPOINT_KEYS))} may be set there; "
            "checkpoint.storage of the run configuration says where shards are kept"
        )
    return ds


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
    value = ds.get("train_micro_batch_size_per_gpu", "auto")
    if value == "auto":
        return max(d for d in range(1, min(share, AUTO_MICRO_BATCH_LIMIT) + 1) if share % d == 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f'{source}: train_micro_batch_size_per_gpu={value!r} must be a whole number >= 1 or "auto"')
    if share % value:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise UserError(
            f"{source}: train_micro_batch_size_per_gpu={value} does not divide a rank's share of the global batch "
            f'({global_batch} / {world_size} ranks = {share}); use one of {divisors} or "auto"'
        )
    return value


def _enabled(ds: dict[str, Any], key: str, source: str) -> bool:
    section = ds.get(key, {})
    if not isinstance(section, dict) or section.get("enabled", False) not in (True, False):
        raise UserError(f'{source}: {key} must be an object like {{"enabled": true}}')
    return bool(section.get("enabled", False))


def _offloads(zero: dict[str, Any], name: str, stage: int, source: str) -> bool:
    section = zero.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f'{source}: zero_optimization.{name}={section!r} must be an object like {{"device": "cpu"}}')
    device = section.get("device", "none")
    if device not in ("none", "cpu"):
        raise UserError(
            f"{source}: {name}.device={device!r} must be none or cpu: what lies on an NVMe disk would be missing in "
            "checkpoints"
        )
    active = bool(device == "cpu")
    if active and stage < OFFLOAD_NEEDS_STAGE[name]:
        raise UserError(
            f"{source}: {name} needs ZeRO stage {OFFLOAD_NEEDS_STAGE[name]} or higher, this file has {stage}"
        )
    return active


def resolve_execution(train: TrainConfig, optim: OptimConfig, path: Path, world_size: int) -> Execution:
    """Loads `path` and fills in what the run config owns, for `world_size` ranks."""
    ds, source = load_ds_config(path), str(path)
    bf16, fp16 = _enabled(ds, "bf16", source), _enabled(ds, "fp16", source)
    if bf16 and fp16:
        raise UserError(f"{source}: bf16 and fp16 are both enabled; choose one")
    if bf16 and train.skip_bad_steps and not ds["bf16"].get("check_grad_overflow", True):
        raise UserError(
            f"{source}: bf16.check_grad_overflow=false with train.skip_bad_steps={train.skip_bad_steps}: DeepSpeed "
            "would not see the steps that are to be left out; remove that key"
        )
    zero = ds.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        raise UserError(f'{source}: zero_optimization={zero!r} must be an object like {{"stage": 1}}')
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    micro = _micro_batch(ds, train.global_batch, world_size, source)
    accumulation = train.global_batch // (micro * world_size)
    ds["train_micro_batch_size_per_gpu"] = micro
    owned: dict[str, object] = {
        "train_batch_size": train.global_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
    }
    fill_auto(ds, owned, source)
    ds.setdefault("steps_per_print", 1_000_000_000)  # the monitor prints; DeepSpeed's own line would double it
    offload = {name: _offloads(zero, name, stage, source) for name in OFFLOAD_NEEDS_STAGE}
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
        precision="bfloat16" if bf16 else "float16" if fp16 else "float32",
        zero_stage=stage,
        offload_optimizer=offload["offload_optimizer"],
        offload_param=offload["offload_param"],
    )
