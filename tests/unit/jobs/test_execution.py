"""The names of DeepSpeed's settings, against DeepSpeed itself; and values that only its own classes refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from engine.config.deepspeed_file import NAMES, REMEDIES
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


@pytest.mark.parametrize("place", CLASSES)
def test_the_names_are_deepspeeds(place: str) -> None:
    current, old = set(), set()
    for name, field in CLASSES[place].model_fields.items():
        is_old = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
        (old if is_old else current).update({name, field.alias or name})
    assert NAMES[place] == current
    assert {f"{place}.{name}" for name in old} <= REMEDIES.keys()


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
