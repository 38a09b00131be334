"""Run as a process: what DeepSpeed and PyTorch do wrong without our mends. Prints JSON: name -> whether they do.

usage: upstream_defects.py FOLDER   on one rank: most of them; on two, those of a group
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import nn
from torch.utils.file_baton import FileBaton

BF16 = {"bf16": {"enabled": True}}


def started(stage: int, optimizer: str = "AdamW", **more: Any) -> Any:
    """Returns DeepSpeed's engine around four weights and a bias, in two groups with other weight decay."""
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    groups = [
        {"params": [module.weight], "weight_decay": 0.5},
        {"params": [module.bias], "weight_decay": 0.0},
    ]
    chosen = getattr(torch.optim, optimizer)(groups, lr=0.5)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    ds_engine, *_ = deepspeed.initialize(model=module, optimizer=chosen, config=settings)
    return ds_engine


def dtype_of(ds_engine: Any) -> torch.dtype:
    return next(ds_engine.module.parameters()).dtype


def step(ds_engine: Any, factor: float = 1.0) -> None:
    """Makes a step whose gradient is `factor` in each entry."""
    loss = ds_engine(torch.ones(1, 4, dtype=dtype_of(ds_engine))).sum() * factor
    ds_engine.backward(loss)
    ds_engine.step()


def states_of(ds_engine: Any) -> list[dict[str, Any]]:
    return list(ds_engine.optimizer.optimizer.state.values())


def stage_0_makes_a_first_step(_: Path) -> bool:
    return any(int(state["step"]) == 1 for state in states_of(started(0, **BF16)))


def one_rank_reduces_gradients(_: Path) -> bool:
    return bool(started(0, **BF16).enable_backward_allreduce)


def fp32_stage_0_keeps_no_norm(_: Path) -> bool:
    ds_engine = started(0)
    step(ds_engine)
    return ds_engine.get_global_grad_norm() is None


def fp32_stage_0_steps_with_gradients_that_are_not_finite(_: Path) -> bool:
    ds_engine = started(0)
    step(ds_engine, float("nan"))
    return bool(ds_engine.module.weight.isnan().all())


def zero_3_keeps_modules(_: Path) -> bool:
    ds_engine = started(3)
    step(ds_engine)
    kept = weakref.ref(ds_engine.module)
    ds_engine.destroy()
    del ds_engine
    gc.collect()
    return kept() is not None


def the_scale_grows_before_the_step(_: Path) -> bool:
    """SGD without decay at rate 0.5: a gradient of 1 changes the bias by -0.5."""
    scaler = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 1}
    ds_engine = started(1, "SGD", fp16=scaler)
    before = float(ds_engine.module.bias)
    step(ds_engine)
    return abs(float(ds_engine.module.bias) - before) < 0.4


def a_csv_file_gets_a_second_header(folder: Path) -> bool:
    section = {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"}}
    for step in range(2):
        MonitorMaster(get_monitor_config(section)).write_events([("loss", 1.0, step)])
    return (folder / "csv" / "loss.csv").read_text().count("step,loss") == 2


def an_exhausted_scale_has_no_class_of_error(_: Path) -> bool:
    scaler = {"enabled": True, "loss_scale": 0, "initial_scale_power": 0, "min_loss_scale": 1, "hysteresis": 1}
    try:
        step(started(1, fp16=scaler), float("inf"))
    except Exception as error:
        return type(error) is Exception and "loss scale already at minimum" in str(error)
    return False


def saved(folder: Path, stage: int) -> Path:
    """Returns a universal checkpoint of a run of two steps."""
    ds_engine = started(stage, **BF16)
    for _ in range(2):
        step(ds_engine)
    info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    ds_engine.save_checkpoint(str(folder), tag="plain", client_state=info)
    arguments = argparse.Namespace(
        input_folder=str(folder / "plain"),
        output_folder=str(folder / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(arguments)
    return folder / "universal"


def loaded(universal: Path, stage: int) -> Any:
    ds_engine = started(stage, checkpoint={"load_universal": True}, **BF16)
    ds_engine.load_checkpoint(str(universal.parent), tag=universal.name)
    return ds_engine


def cannot_load(universal: Path, stage: int) -> bool:
    try:
        loaded(universal, stage)
    except Exception:
        return True
    return False


def zero_3_gives_all_groups_the_settings_of_the_first(folder: Path) -> bool:
    groups = loaded(saved(folder, 3), 3).optimizer.optimizer.param_groups
    return [group["weight_decay"] for group in groups] == [0.5, 0.5]


def zero_3_shares_one_step_count(folder: Path) -> bool:
    first, *rest = [state["step"] for state in states_of(loaded(saved(folder, 3), 3))]
    return bool(rest) and all(one is first for one in rest)


def zero_3_cannot_load_what_zero_1_wrote(folder: Path) -> bool:
    return cannot_load(saved(folder, 1), 3)


def zero_1_cannot_load_what_zero_3_wrote(folder: Path) -> bool:
    return cannot_load(saved(folder, 3), 1)


def shared_buffers_keep_their_names(_: Path) -> bool:
    torch.distributed.barrier()
    buffers = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"))
    torch.distributed.barrier()
    for buffer in buffers:
        buffer.unlink(missing_ok=True)
    return bool(buffers)


def a_build_waits_for_the_dead(folder: Path) -> bool:
    """PyTorch's: the file of a process that was killed while it compiled is never looked at again."""
    folder.mkdir()
    (folder / "lock").touch()
    return not FileBaton(str(folder / "lock")).try_acquire()


def a_collective_is_deprecated(_: Path) -> bool:
    """PyTorch's newer name for it is not what DeepSpeed calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deepspeed.comm.all_gather_into_tensor(torch.zeros(1), torch.ones(1))
    return any(issubclass(warning.category, FutureWarning) for warning in caught)


def gloo_aborts_a_rank_that_ends(folder: Path) -> bool:
    folder.mkdir()
    script = Path(__file__).parents[1] / "support" / "late_gloo.py"
    command = [sys.executable, str(script), "{}", str(folder / "store"), "plain"]
    ranks = [
        subprocess.Popen([word.format(rank) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for rank in (0, 1)
    ]
    return [process.wait(timeout=100) for process in ranks][1] == -signal.SIGABRT


RESTARTED = """
import os, sys
from torch.distributed.rendezvous import rendezvous
store, _, _ = next(rendezvous("env://"))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("ready/0", "")
    sys.exit(1)
print("kept" if store.check(["ready/0"]) else "anew", flush=True)
"""


def torchrun_keeps_the_store_of_a_failed_attempt(folder: Path) -> bool:
    folder.mkdir()
    (folder / "rank.py").write_text(RESTARTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max_restarts=1",
        "--monitor_interval=0.1",
    ]
    done = subprocess.run([*command, str(folder / "rank.py")], capture_output=True, text=True, timeout=100)
    return done.stdout.strip() == "kept"


DEFECTS: list[Callable[[Path], bool]] = [
    stage_0_makes_a_first_step,
    a_csv_file_gets_a_second_header,
    one_rank_reduces_gradients,
    fp32_stage_0_keeps_no_norm,
    fp32_stage_0_steps_with_gradients_that_are_not_finite,
    zero_3_keeps_modules,
    the_scale_grows_before_the_step,
    an_exhausted_scale_has_no_class_of_error,
    zero_3_gives_all_groups_the_settings_of_the_first,
    zero_3_shares_one_step_count,
    zero_3_cannot_load_what_zero_1_wrote,
    zero_1_cannot_load_what_zero_3_wrote,
    a_build_waits_for_the_dead,
    a_collective_is_deprecated,
    gloo_aborts_a_rank_that_ends,
    torchrun_keeps_the_store_of_a_failed_attempt,
]


OF_A_GROUP = [shared_buffers_keep_their_names]


def main() -> None:
    root = Path(sys.argv[1])
    get_accelerator().is_fp16_supported = lambda: True  # slow on most processors, but right
    deepspeed.init_distributed("gloo", verbose=False)
    found = {}
    for defect in DEFECTS if torch.distributed.get_world_size() == 1 else OF_A_GROUP:
        with contextlib.redirect_stdout(io.StringIO()):
            found[defect.__name__] = defect(root / defect.__name__)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
