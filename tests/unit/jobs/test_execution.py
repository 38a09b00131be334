"""The names of DeepSpeed's settings, against DeepSpeed itself; and values that only its own classes refuse."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from deepspeed.monitor.config import CometConfig, CSVConfig, WandbConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from engine.config.deepspeed_file import NAMES, REMEDIES, TRACKERS
from engine.config.distill import OptimConfig, TrainConfig
from engine.errors import UserError
from engine.jobs.execution import plan_execution

CLASSES: dict[str, type[DeepSpeedConfigModel]] = {
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
}


MONITORS: dict[str, type[DeepSpeedConfigModel]] = {"wandb": WandbConfig, "comet": CometConfig, "csv_monitor": CSVConfig}


@pytest.mark.parametrize("place", CLASSES)
def test_the_names_are_deepspeeds(place: str) -> None:
    current, old = set(), set()
    for name, field in CLASSES[place].model_fields.items():
        is_old = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
        (old if is_old else current).update({name, field.alias or name})
    assert NAMES[place] == current
    assert {f"{place}.{name}" for name in old} <= REMEDIES.keys()


@pytest.mark.parametrize("place", MONITORS)
def test_each_name_of_a_tracker_is_taken_or_has_a_remedy(place: str) -> None:
    refused = {key.partition(".")[2] for key in REMEDIES if key.startswith(f"{place}.")}
    assert sorted([*NAMES[place], *refused]) == sorted(MONITORS[place].model_fields)


@pytest.mark.parametrize(("name", "package"), [item for item in TRACKERS.items() if item[1] is not None])
def test_a_tracker_whose_package_is_missing_is_refused(tmp_path: Path, name: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({name: {"enabled": True}}))
    says = f"{name}.enabled=true, but the Python package '{package}' is missing; pip install {package}, or write false"
    with pytest.raises(UserError, match=says):
        plan_execution(str(path), TrainConfig(), OptimConfig())


def test_what_deepspeed_has_no_more_is_not_taken() -> None:
    assert not NAMES[""] & set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert not NAMES["zero_optimization"] & set(_REMOVED_ZERO_CONFIG_KEYS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {\n"overlap_comm": "maybe"}}', 'line 2: zero_optimization.overlap_comm="maybe": '),
        ('{"zero_optimization": {"stage": 4}}', "line 1: zero_optimization.stage=4 must be 0, 1, 2 or 3"),
        ('{"fp16": {"enabled": true, "loss_scale": "dynamic"}}', 'fp16.loss_scale="dynamic": '),
        ('{"comms_logger": {"enable": true}}', "comms_logger.enable=true: Extra inputs are not permitted"),
        ('{"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}', "line 1: zero_optimization: Assertion failed"),
        ('{"wandb": {"enabled": true, "project": 3}}', "line 1: wandb.project=3: Input should be a valid string"),
        ('{"zero_optimization": {"stage": "1"}, "bf16": 3}', 'zero_optimization.stage="1" must be a whole number'),
    ],
)  # fmt: skip
def test_values_that_deepspeed_refuses_are_refused_before_any_model_is_loaded(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        plan_execution(str(path), TrainConfig(), OptimConfig())
    assert says in str(error.value)
    assert "\n" not in str(error.value)
