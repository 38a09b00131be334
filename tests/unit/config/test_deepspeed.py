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
        ({"tensorboard": {"enabled": True}}, "remove it: every run writes TensorBoard's events into its output_dir"),
        ({"wandb": {"project": "mine"}}, "wandb has no effect without enabled; write it, true or false"),
        ({"wandb": {"enabled": True, "entity": "me"}}, "unknown key 'wandb.entity'"),
        ({"csv_monitor": {"enabled": True, "output_path": "x"}}, "the files are in the folder csv of the run's output"),
        ({"comet": {"enabled": True, "samples_log_interval": 5}}, "remove it: train.log_every of the run config owns"),
        ({"comet": True}, "comet=true must be an object"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
        ({"fp16": {"loss_scale": 0}}, "line 1: fp16 has no effect without enabled; write it, true or false"),
        ({"steps_per_print": 0}, "steps_per_print=0 must be at least 1; remove it"),
        ({"zero_optimization": {"offload_optimizer": {"device": "CPU"}}}, "'CPU' must be none or cpu"),
        ({"flops_profiler": {"enable": True}}, "unknown key 'flops_profiler.enable'; did you mean 'enabled'"),
        ({"fp16": {"enabled": True}}, "fp16 needs ZeRO stage 1 or higher.* use ds_configs/zero1_fp16.json"),
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


def test_trackers_are_not_for_deepspeeds_engine(tmp_path: Path) -> None:
    """It would send them points of its own."""
    mine = {"enabled": True, "project": "mine"}
    path = write(tmp_path, wandb=mine, comet={"enabled": False}, csv_monitor={"enabled": True})
    execution = resolve(run(32), path, 1)
    assert execution.trackers == {"wandb": mine, "csv_monitor": {"enabled": True}}
    assert not {"wandb", "comet", "csv_monitor"} & execution.resolved.keys()


def test_global_batch_must_fit_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"train.global_batch=32 is not divisible by 3 ranks; use e.g. 30, or, to continue a run"
    ):
        resolve(run(32), write(tmp_path), 3)


def test_lamb_and_zero_do_not_go_together() -> None:
    with pytest.raises(UserError, match="whole tensors"):
        resolve(run(optim=OptimConfig(name="lamb")), FOLDER / "zero2_bf16.json", 1)
    resolve(run(optim=OptimConfig(name="lamb")), FOLDER / "zero0_bf16.json", 1)


WRONG = [
    ("", "is empty; write {} to use the defaults"),
    ('{\n"bf16": {"enabled": true},}', "line 2: not valid JSON"),
    ('{\n// fast\n"bf16": {}}', "line 2: not valid JSON .*; JSON allows no comments, and no comma before a closing"),
    ("[1]", "the top level must be a JSON object"),
    ("[" * 5000, "not valid JSON"),
    ('{"seed": %s}' % ("9" * 5000), "not valid JSON"),
    ('{"zero_optimization": {},\n"bf16": {},\n"zero_optimization": {}}', "line 3: zero_optimization occurs twice"),
    ('{"zero_optimization": {"stage": 1,\n"stage": 2}}', "line 2: zero_optimization.stage occurs twice"),
    ('{"gradient_clipping": NaN}', "line 1: gradient_clipping is not a finite number"),
    ('{"zero_optimization": {"reduce_bucket_size": 1e400}}', "reduce_bucket_size is not a finite number"),
    ('{"zero_optimization": {},\n"offload_optimizer": {}}', "line 2: .*; it belongs in zero_optimization$"),
    ('{"stage": 2}', "unknown key 'stage'; it belongs in zero_optimization"),
    ('{"zero_optimization": {"gradient_clipping": 1}}', "it belongs in the top level"),
    ('{"zero_optimization": {"cpu_offload": true}}', 'to offload write "offload_optimizer": {"device": "cpu"} in its'),
    ('{"zero_optimization": {"cpu_offload": false}}', "an old name; .* in its place, else remove it"),
    ('{"cpu_offload_params": true}', 'to offload write "offload_param": {"device": "cpu"}'),
    ('{"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": true}}', "stage3_gather_16bit_weights_on_mod"),
    ('{"bfloat16": {"enabled": true}}', "the old name of bf16"),
    ('{"sparse_gradients": true}', "DeepSpeed no longer has it"),
    ('{"activation_checkpointing": {}}', "remove it: student.activation_checkpointing"),
    ('{"checkpoint": {"use_node_local_storage": true}}', "checkpoint.storage of the run config owns it"),
    ('{"zero_optimization": true}', 'zero_optimization=true must be an object like {"stage": 1}'),
    ('{"zero_optimization": null}', 'zero_optimization=null must be an object like {"stage": 1}'),
    ('{"bf16": {"enabled": "auto"}}', 'bf16.enabled="auto" must be true or false'),
    ('{"zero_optimization": {"stage": true}}', "stage=true must be a whole number"),
    ('{"gradient_clipping": true}', "gradient_clipping=true must be a number"),
    ('{"prescale_gradients": "no"}', 'prescale_gradients="no" must be true or false'),
    ('{"communication_data_type": "bf17"}', 'communication_data_type="bf17" must be fp32, fp16 or bf16'),
    ('{"torch_autocast": {"dtype": "half"}}', "must be a precision like fp32, fp16 or bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG, ids=lambda one: one[:50])
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says.replace("{", r"\{")) as error:
        load_ds_config(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"stage": 1,\n"zero_optimization": {"overlap_com": true},\n"bf16": 3}')
    with pytest.raises(UserError, match=r"^3 problems: \(1\) .*line 1: .* \(2\) .*line 2: .* \(3\) .*line 3: bf16=3"):
        load_ds_config(path)


def test_contradictions_are_said_at_once(tmp_path: Path) -> None:
    on, nvme = {"enabled": True}, {"device": "nvme"}
    path = write(tmp_path, bf16=on, fp16=on, zero_optimization={"stage": 3, "offload_param": nvme})
    with pytest.raises(UserError, match=r"^2 problems: .*choose one .*offload_param.device='nvme' must be none or cpu"):
        resolve(run(32), path, 1)


def test_contradictions_are_said_beside_other_mistakes(tmp_path: Path) -> None:
    on = {"enabled": True}
    path = write(tmp_path, bf16=on, fp16=on, zero_optimization={"stage": "2", "offload_param": True}, foo=1)
    with pytest.raises(UserError, match=r"^4 problems: .*stage=\"2\" .*offload_param=true .*'foo'.*choose one"):
        resolve(run(32), path, 1)


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf{}", b"{\r\n\t\r\n}", b'{"data_types": {"param_dtype": "bf16"}}'])
def test_files_of_other_editors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ds.json").write_bytes(data)
    assert resolve(run(32), tmp_path / "ds.json", 1).zero_stage == 0


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; shipped in .*zero1_bf16.json"):
        load_ds_config(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"is a folder; shipped in"):
        load_ds_config(tmp_path)
    (tmp_path / "bad.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(UserError, match=r"bad\.json: is UTF-16 text; save it as UTF-8"):
        load_ds_config(tmp_path / "bad.json")
