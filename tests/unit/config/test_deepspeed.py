import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.deepspeed import Execution, resolve_execution
from engine.config.deepspeed_file import FOLDER, load_ds_config
from engine.config.distill import OptimConfig, RunConfig, TrainConfig
from engine.errors import UserError

SHIPPED = sorted(FOLDER.glob("*.json"))


def write(tmp_path: Path, **ds: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds))
    return path


def run(global_batch: int = 32, **kwargs: Any) -> RunConfig:
    return RunConfig(train=TrainConfig(global_batch=global_batch, steps=100, warmup_steps=0), **kwargs)


def resolve(config: RunConfig, path: Path, world: int) -> Execution:
    return resolve_execution(config.train, config.optim, path, world)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.parametrize("world", [1, 2, 8])
def test_shipped_files_resolve(path: Path, world: int) -> None:
    execution = resolve(run(64), path, world)
    product = execution.micro_batch_size * execution.grad_accum_steps * world
    assert product == 64 == execution.resolved["train_batch_size"]
    assert "auto" not in json.dumps(execution.resolved)


def test_every_shipped_file_has_its_line_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text()
    assert SHIPPED
    for path in SHIPPED:
        assert f"| {path.name} |" in text


def test_accumulation_is_derived(tmp_path: Path) -> None:
    execution = resolve(run(32), write(tmp_path, train_micro_batch_size_per_gpu=4), 2)
    assert (execution.micro_batch_size, execution.grad_accum_steps) == (4, 4)


@pytest.mark.parametrize(
    ("ds", "says"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64, but the run config says 32"),
        ({"gradient_clipping": 5.0}, "gradient_clipping=5.0, but the run config says 1.0"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps=7"),
        ({"train_micro_batch_size_per_gpu": 5}, r"does not divide .* use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"train_micro_batch_size_per_gpu": "4"}, "whole number"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: remove it: optim"),
        ({"scheduler": {}}, "scheduler: remove it: train.schedule"),
        ({"tensorboard": {"enabled": True}}, "owns the TensorBoard writer"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
        ({"bf16": True}, "must be an object"),
        ({"zero_optimization": 2}, "zero_optimization=2 must be an object"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, 'offload_param="cpu" must be an object'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs ZeRO stage 1"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'nvme' must be none or cpu"),
    ],
)
def test_conflicts_name_file_key_and_remedy(tmp_path: Path, ds: dict[str, Any], says: str) -> None:
    path = write(tmp_path, **ds)
    with pytest.raises(UserError, match=says) as error:
        resolve(run(32), path, 1)
    assert str(path) in str(error.value)


def test_global_batch_must_fit_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"train.global_batch=32 is not divisible by 3 ranks; use e.g. 30, or, to continue a run"
    ):
        resolve(run(32), write(tmp_path), 3)


def test_lamb_and_zero_do_not_go_together() -> None:
    with pytest.raises(UserError, match="whole tensors"):
        resolve(run(optim=OptimConfig(name="lamb")), FOLDER / "zero2_bf16.json", 1)
    resolve(run(optim=OptimConfig(name="lamb")), FOLDER / "zero0_bf16.json", 1)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; shipped in .*zero1_bf16.json"):
        load_ds_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_ds_config(tmp_path / "bad.json")
