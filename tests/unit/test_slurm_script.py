"""examples/slurm.sbatch with stand-ins for srun and scontrol, which this machine does not have."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT

SRUN = """#!/bin/sh
trap 'exit "$CODE_WHEN_TOLD"' USR1
echo "$@" >"$SLURM_SUBMIT_DIR/started"
[ "$CODE" = wait ] || exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/sh
echo "$@" >"$SLURM_SUBMIT_DIR/requeued"
"""


@pytest.mark.parametrize(
    ("code", "told", "requeued"),
    [("0", None, False), ("1", None, False), ("137", None, False), ("wait", 4, True), ("wait", 137, True)],
)
def test_a_preempted_job_goes_back_into_the_queue(tmp_path: Path, code: str, told: int | None, requeued: bool) -> None:
    """told: what srun returns after the SIGTERM that Slurm sends to the batch shell."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "CODE": code,
        "CODE_WHEN_TOLD": str(told),
    }
    job = subprocess.Popen(["bash", str(ROOT / "examples" / "slurm.sbatch"), "--seed", "a b"], env=env)
    try:
        if told is not None:
            until = time.monotonic() + 20
            while not (tmp_path / "started").exists():
                assert time.monotonic() < until
                time.sleep(0.02)
            time.sleep(0.5)  # both traps are set
            job.send_signal(signal.SIGTERM)
        assert job.wait(20) == (told if told is not None else int(code))
    finally:
        job.kill()
    assert (tmp_path / "started").read_text() == "--kill-on-bad-exit=1 python launch/distill.py --seed a b\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
