"""PyTorch's elastic agent as launcher: it starts all ranks again once one has died, and they continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from faulting import assert_checkpoints_whole, assert_gone, output_file
from launching import Run, kill_session, spawn

pytestmark = [pytest.mark.faults, pytest.mark.launcher, pytest.mark.thorough]


def start(run: Run, *options: str) -> subprocess.Popen[str]:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", *options]
    with output_file(run).open("w") as output:
        return spawn([*torchrun, "launch/distill.py", "--output_dir", str(run.output_dir), *run.argv], output)


def test_a_killed_rank_is_started_again(make_run) -> None:
    run = make_run("run", micro=2, train__steps=400, train__save_every=10)
    process = start(run, "--max-restarts", "2")
    try:
        run.wait_for_step(15, process)
        ranks = [p for p in psutil.Process(process.pid).children() if "launch/distill.py" in p.cmdline()]
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        process.wait(timeout=240)
        assert_gone(process.pid, within_s=10)
    finally:
        kill_session(process)
    assert process.returncode == 0, output_file(run).read_text()[-3000:]
    starts = [record["resumed_from"] for record in run.records("run")]
    assert starts[0] is None
    assert starts[1] is not None
    assert len(starts) == 2
    assert run.records("result")[-1]["step"] == 400
    assert assert_checkpoints_whole(run)[-1] == "step-00000400"


def test_the_agent_is_killed(make_run) -> None:
    """Its ranks have nobody to end them, and end themselves."""
    run = make_run("run", micro=2, train__steps=100_000, train__schedule="constant", train__save_every=10)
    process = start(run)
    try:
        run.wait_for_step(15, process)
        process.kill()
        process.wait()
        assert_gone(process.pid, within_s=10)
    finally:
        kill_session(process)
    assert assert_checkpoints_whole(run)
