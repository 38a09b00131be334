"""`teacher.placement: zero3` through the real launcher, two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from tiny_encoders import save_tiny

BF16_ROUNDING = 2**-5
"""A few units in the last place of the largest entry."""
REAL = ROOT / "models" / "all-MiniLM-L6-v2"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.launcher
@pytest.mark.timeout(900)  # the first DeepSpeed start compiles its CPU operators
def test_sharded_teacher_equals_the_replicated_one(tmp_path: Path) -> None:
    models = [save_tiny("modernbert", tmp_path / "modernbert"), save_tiny("bert", tmp_path / "mlm-bert", mlm=True)]
    if not (REAL / "config.json").is_file():
        pytest.skip(f"{REAL} is not there (see the README on fetching models)")
    models.append(str(REAL))
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), str(Path(__file__).with_name("teacher_zero3.py")), str(tmp_path)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *models], capture_output=True, text=True, env=environment, check=False)
    files = sorted(tmp_path.glob("rank*.json"))
    assert len(files) == 2, run.stdout[-3000:] + run.stderr[-3000:]
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert result.pop("world") == 2
        assert len(result) == 2 * len(models)
        for case, seen in result.items():
            # in bf16 the replicated one has its weights packed for the matrix products, which then sum in another order
            assert seen["difference"] <= (BF16_ROUNDING if "bfloat16" in case else 0.0), (case, seen)
            assert seen["same_counts"], case
            assert seen["same_flops"], case
            assert 0.5 <= seen["sharded_bytes"] / seen["whole_bytes"] < 0.51, (case, seen)
