"""examples/slurm.sbatch, and the wrapper of docs/multi_node.md, with stand-ins for what they start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT

SRUN = """#!/bin/sh
trap 'sleep 1; touch "$SLURM_SUBMIT_DIR/ended"; exit "$CODE_WHEN_TOLD"' USR1
echo "$@" >"$SLURM_SUBMIT_DIR/started"
[ "$CODE" = wait ] || exit "$CODE"
for _ in $(seq 600); do sleep 0.05; done # not for ever: where a test fails, nobody ends it
"""
SCONTROL = """#!/bin/sh
echo "$@" >"$SLURM_SUBMIT_DIR/requeued"
ls "$SLURM_SUBMIT_DIR/ended" >"$SLURM_SUBMIT_DIR/requeued_after"
"""
DEEPSPEED = """#!/bin/sh
trap 'sleep 1; exit 4' USR1
echo $$ >started
for _ in $(seq 600); do sleep 0.05; done
"""
PKILL = """#!/bin/sh
echo "$@" >told
kill -USR1 "$(cat started)"
"""


def write_programs(folder: Path, **texts: str) -> dict[str, str]:
    """Returns an environment that has them first in PATH."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def wait_until_started(file: Path) -> None:
    until = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.5)  # all traps are set


@pytest.mark.parametrize(
    ("code", "told", "requeued"),
    [
        ("0", None, False),
        ("1", None, False),
        ("4", None, True),  # Slurm told the ranks itself
        ("143", None, False),
        ("wait", 4, True),
        ("wait", 137, False),
        ("wait", 138, True),
    ],
)
def test_a_preempted_job_goes_back_into_the_queue(tmp_path: Path, code: str, told: int | None, requeued: bool) -> None:
    """told: what srun returns, after a second, when Slurm has sent SIGTERM to the batch shell, here twice."""
    programs = write_programs(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    env = {
        **programs,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": "77",
        "CODE": code,
        "CODE_WHEN_TOLD": str(told),
    }
    job = subprocess.Popen(["bash", str(ROOT / "examples" / "slurm.sbatch"), "--seed", "a b"], env=env)
    try:
        if told is not None:
            wait_until_started(tmp_path / "started")
            for _ in range(2):
                job.send_signal(signal.SIGTERM)
                time.sleep(0.3)
        assert job.wait(20) == (told if told is not None else int(code))
    finally:
        job.kill()
    options = "--kill-on-bad-exit=0 --wait=600 --cpus-per-task=8"
    assert (tmp_path / "started").read_text() == f"{options} python launch/distill.py --seed a b\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
        assert bool((tmp_path / "requeued_after").read_text()) == (told is not None), "the ranks were still writing"


def test_a_group_that_is_ended_lets_the_ranks_write(tmp_path: Path) -> None:
    """The wrapper in the documentation's section on containers."""
    text = (ROOT / "docs" / "multi_node.md").read_text(encoding="utf-8")
    wrapper = tmp_path / "run.sh"
    wrapper.write_text("#!/bin/bash" + text.partition("#!/bin/bash")[2].partition("```")[0])
    env = write_programs(tmp_path / "bin", deepspeed=DEEPSPEED, pkill=PKILL)
    job = subprocess.Popen(["bash", str(wrapper), "--seed", "1"], cwd=tmp_path, env=env, start_new_session=True)
    try:
        wait_until_started(tmp_path / "started")
        for _ in range(2):
            os.killpg(job.pid, signal.SIGTERM)
            time.sleep(0.3)
        assert job.wait(20) == 4
    finally:
        job.kill()
    assert (tmp_path / "told").read_text() == "-USR1 -f distill[.]py --local_rank\n"
