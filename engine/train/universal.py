"""Continuing with other ranks or another ZeRO stage, through DeepSpeed's universal checkpoints.

A universal checkpoint holds each parameter's fp32 weight and optimizer state whole. DeepSpeed's converter writes it,
and its loader cuts it for the ranks that are there."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.deepspeed import LAYOUT_KEYS, Execution
from engine.errors import UserError, first_line
from engine.ranks.collectives import from_rank_zero, gathered
from engine.records.columns import counted
from engine.train.deepspeed_engine import DeepSpeedModel

PREFIX = "universal-"
"""Beginning of the name of a conversion's folder, beside the checkpoint; it is removed once loaded."""
INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""Part of the client state of every checkpoint: the converter wants it for stages 1 and 2."""
_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_MODEL_FILE = {False: "mp_rank_00_model_states.pt", True: "zero_pp_rank_0_mp_rank_00_model_states.pt"}
"""Name of the model's file, by whether the weights are sharded (stage 3)."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that other ranks, or another ZeRO stage, are to continue from."""

    tag: str
    saved_stage: int
    saved_ranks: int
    stage: int
    ranks: int

    def __str__(self) -> str:
        return (
            f"written by {counted(self.saved_ranks, 'rank')} under ZeRO-{self.saved_stage}, converted for {self.ranks} "
            f"under ZeRO-{self.stage}"
        )


def plan_conversion(tag: str, *, saved: dict[str, Any], execution: Execution) -> Conversion | None:
    """Returns what must be done to continue from checkpoint `tag`, whose marker says `saved`; None when it loads as it
    is. Raises UserError for what cannot be continued."""
    facts = execution.facts
    if saved["precision"] != facts["precision"]:
        raise UserError(
            f"cannot continue {tag}: it was written in {saved['precision']} and this start has {facts['precision']}; "
            "run it with the same precision (ranks, ZeRO stages 1 to 3, micro batch and accumulation may change)"
        )
    stages = (saved["zero_stage"], facts["zero_stage"])
    layouts = saved.get("layout", execution.layout), execution.layout  # markers of older versions do not say it
    same_shards = saved["world_size"] == facts["world_size"] and layouts[0] == layouts[1]
    if stages[0] == stages[1] and (same_shards or stages[0] == 0):
        return None  # stage 0 has everything on every rank
    if 0 in stages:
        raise UserError(
            f"cannot continue {tag}: it was written under ZeRO-{stages[0]} and this start has ZeRO-{stages[1]}; stages "
            "1, 2 and 3 can follow each other, 0 only itself"
        )
    if any(layout["round_robin_gradients"] and stage < 3 for layout, stage in zip(layouts, stages, strict=True)):
        raise UserError(
            f"cannot continue {tag}: zero_optimization.round_robin_gradients orders the shards in a way that "
            "DeepSpeed's universal checkpoints do not know (losses were off by up to 28 %). Start as it was written "
            f"({counted(saved['world_size'], 'rank')}, ZeRO-{stages[0]}, round_robin_gradients="
            f"{bool(layouts[0]['round_robin_gradients'])})"
        )
    return Conversion(tag, stages[0], saved["world_size"], stages[1], facts["world_size"])


def load(model: DeepSpeedModel, checkpoints: Path, conversion: Conversion, *, is_rank_zero: bool) -> dict[str, Any]:
    """Converts the checkpoint into a folder beside it, loads that, and removes it; returns the client state. Raises
    UserError when that cannot be done, for want of room above all. Collective."""
    target = checkpoints / f"{PREFIX}{conversion.tag}"
    from_rank_zero(lambda: _convert(checkpoints / conversion.tag, target, conversion))
    ds_engine = model.ds_engine
    with _universal(ds_engine), _kept_hyperparameters(ds_engine):
        state = model.load_checkpoint(checkpoints, target.name)
    assert state is not None, "it was converted just now"
    _own_step_counts(ds_engine.optimizer.optimizer)
    gathered(None)  # all have read it
    if is_rank_zero:
        shutil.rmtree(target, ignore_errors=True)
    return state


@contextmanager
def _universal(ds_engine: Any) -> Iterator[None]:
    """Makes the engine load universal checkpoints inside of the block."""
    config = ds_engine._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


@contextmanager
def _kept_hyperparameters(ds_engine: Any) -> Iterator[None]:
    """Keeps the settings of all parameter groups as they are while a checkpoint is loaded. They are those of the run
    configuration, which is the same; the learning rate is the schedule's."""
    # until DeepSpeed > 0.19.8: stage 3 gives all groups the settings of the first, so biases would get weight decay
    groups = ds_engine.optimizer.optimizer.param_groups
    before = [{key: value for key, value in group.items() if key not in ("params", "lr", "step")} for group in groups]
    yield
    for group, settings in zip(groups, before, strict=True):
        group.update(settings)


def _own_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter a step count of its own, as a tensor where its optimizer looks for it."""
    # until DeepSpeed > 0.19.8: its loader gives all parameters one tensor, which each of them would then increase; and
    # on the CPU, where fused kernels of a GPU do not look. It is a plain number after a run with offload, which
    # PyTorch's optimizers do not take.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    of_torch = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)  # not one kind before PyTorch 2.7
    for state in optimizer.state.values():
        step = state.get("step")
        if of_torch and isinstance(step, int | float):
            step = torch.tensor(float(step))
        if isinstance(step, torch.Tensor):
            state["step"] = step.to(state["exp_avg"].device if on_device else step.device, copy=True)


def _convert(source: Path, target: Path, conversion: Conversion) -> None:
    """Writes a universal checkpoint that this start can load. Raises UserError, and then leaves nothing."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: a pool would fork it
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and steps
            ds_to_universal.main(arguments)
        (source.parent / "latest_universal").unlink(missing_ok=True)  # of the converter; nobody reads it
        _require_states(source, target)
        if (conversion.saved_stage == 3) != (conversion.stage == 3):
            _relay(target, to_stage_3=conversion.stage == 3)
    except (OSError, RuntimeError, LookupError, ValueError, AssertionError) as error:  # a full disk is a RuntimeError
        shutil.rmtree(target, ignore_errors=True)
        raise UserError(
            f"{source}: cannot be converted for {counted(conversion.ranks, 'rank')} under ZeRO-{conversion.stage}: "
            f"{type(error).__name__}: {first_line(error)}. A conversion needs up to three times as much room beside "
            "the checkpoint, and one whose optimizer has made a step; or start as it was written "
            f"({counted(conversion.saved_ranks, 'rank')}, ZeRO-{conversion.saved_stage}, its "
            f"{' and '.join(LAYOUT_KEYS)})"
        ) from None


def _require_states(source: Path, target: Path) -> None:
    """Raises ValueError for a parameter without optimizer state: the converter leaves it out, and rounds its weight."""
    model = _read(next(iter(sorted(source.glob("*model_states.pt")))))
    for name in (name for group in model["param_shapes"] for name in group):
        if not (target / "zero" / name / "exp_avg.pt").is_file():
            raise ValueError(f"it has no optimizer state of {name}")


def _relay(folder: Path, *, to_stage_3: bool) -> None:
    """Writes the universal checkpoint of stages 1 and 2 as that of stage 3, or the other way round.

    Both hold the same numbers. Stage 3 keeps them flat, the step count in the common optimizer state, and a model file
    for each rank; stages 1 and 2 keep them in their shapes, the step count with each parameter, and one model file."""
    # until DeepSpeed > 0.19.8: a loader does not read what the converter writes for the other stages
    from deepspeed import __version__
    from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS

    model_file = folder / _MODEL_FILE[not to_stage_3]
    model = _read(model_file)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    for other in folder.glob("*model_states.pt"):
        if other != model_file:
            other.unlink()
    model_file.rename(folder / _MODEL_FILE[to_stage_3])
    common_file = folder / "zero" / "optimizer_state.pt"
    common = _read(common_file)
    step: Any = None
    if not to_stage_3:
        step = common[OPTIMIZER_STATE_DICT]["state"][0]["step"]
    for name, shape in shapes.items():
        of_parameter = folder / "zero" / name
        for state in _STATES:
            file = of_parameter / f"{state}.pt"
            contents = _read(file)
            tensor = contents[PARAM] if isinstance(contents, dict) else contents
            torch.save(tensor.reshape(-1) if to_stage_3 else {PARAM: tensor.reshape(shape)}, file)
        if to_stage_3:
            step = _read(of_parameter / "step.pt")
            (of_parameter / "step.pt").unlink()
        else:
            torch.save(step, of_parameter / "step.pt")
    common.setdefault(DS_VERSION, __version__)
    if to_stage_3:
        common[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, "param_groups": common[PARAM_GROUPS]}
    torch.save(common, common_file)


def _read(file: Path) -> Any:
    # our own checkpoint: DeepSpeed writes it as a pickle with objects, which weights_only cannot read
    return torch.load(file, map_location="cpu", weights_only=False)
