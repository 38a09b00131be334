"""Every Triton kernel compiles for A100 and H100 without one, and keeps its numbers in registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

SCRIPT = Path(__file__).with_name("compile_kernels.py")
HAS_COMPILER = importlib.util.find_spec("triton") is not None and Version(version("triton")) >= Version("3.7")


@pytest.mark.thorough
@pytest.mark.skipif(not HAS_COMPILER, reason="counts registers with Triton 3.7 or newer: pip install 'triton>=3.7'")
def test_every_kernel_compiles_without_register_spills() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["sm"] for one in made} == {80, 90}
    assert {one["kernel"].rpartition(" bf16")[0] for one in made} >= {
        "score, whole", "score, by rows", "KL, log sums", "KL, by queries", "KL, by keys", "hidden states"
    }  # fmt: skip
    spilled = [one for one in made if one["spills"]]
    assert not spilled, spilled
