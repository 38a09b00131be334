"""Each mend of another project's defect is still needed: a test fails when upstream has mended it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, free_port

pytestmark = [pytest.mark.launcher, pytest.mark.thorough]  # what they say changes with a new version alone

MENDS = {
    "stage_0_makes_a_first_step": "engine/train/deepspeed_engine.py:_without_first_update",
    "one_rank_reduces_gradients": "engine/train/deepspeed_engine.py:_drop_idle_work",
    "fp32_stage_0_keeps_no_norm": "engine/train/deepspeed_engine.py:DeepSpeedModel.step",
    "fp32_stage_0_steps_with_gradients_that_are_not_finite": "engine/train/deepspeed_engine.py:_without_update",
    "zero_3_keeps_modules": "engine/train/deepspeed_engine.py:DeepSpeedModel.release",
    "the_scale_grows_before_the_step": "engine/train/deepspeed_engine.py:_grow_scale_after_step",
    "an_exhausted_scale_has_no_class_of_error": "engine/train/deepspeed_engine.py:DeepSpeedModel.step",
    "zero_3_gives_all_groups_the_settings_of_the_first": "engine/train/universal.py:_kept_hyperparameters",
    "zero_3_shares_one_step_count": "engine/train/universal.py:_own_step_counts",
    "zero_3_cannot_load_what_zero_1_wrote": "engine/train/universal.py:_relay",
    "zero_1_cannot_load_what_zero_3_wrote": "engine/train/universal.py:_relay",
    "a_csv_file_gets_a_second_header": "engine/train/trackers.py:_open",
    "shared_buffers_keep_their_names": "engine/ranks/runtime.py:_unlink_shared_buffers",
    "a_build_waits_for_the_dead": "engine/ranks/extension_builds.py:_Baton",
    "a_collective_is_deprecated": "engine/ranks/runtime.py:join_ranks",
    "gloo_aborts_a_rank_that_ends": "engine/ranks/exit.py:run_rank",
    "torchrun_keeps_the_store_of_a_failed_attempt": "engine/ranks/rendezvous.py:agree",
}


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Returns whether each defect is there without our mend."""
    folder = tmp_path_factory.mktemp("upstream")
    return found_by(folder, ranks=1) | found_by(folder, ranks=2)


def found_by(folder: Path, ranks: int) -> dict[str, bool]:
    command = [sys.executable, str(Path(__file__).with_name("upstream_defects.py")), str(folder)]
    env = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)} for rank in range(ranks)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env | place)
        for place in places
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert not any(process.returncode for process in started), outputs
    found: dict[str, bool] = json.loads(outputs[0][0].splitlines()[-1])
    return found


@pytest.mark.parametrize("name", MENDS)
def test_a_mend_is_still_needed(defects: dict[str, bool], name: str) -> None:
    assert defects[name], f"upstream has mended it: remove {MENDS[name]}"


def test_every_defect_has_its_mend(defects: dict[str, bool]) -> None:
    assert defects.keys() == MENDS.keys()
