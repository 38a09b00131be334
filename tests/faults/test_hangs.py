"""A rank that hangs ends the job within a stated time, with the stacks of every rank."""

from __future__ import annotations

import os
import signal
import time

import pytest
from faulting import assert_checkpoints_whole, assert_gone, end, start_again

pytestmark = [pytest.mark.faults, pytest.mark.launcher]

LIMIT_S = 4
ENDLESS = {"ranks": 2, "micro": 2, "train__steps": 100_000, "train__schedule": "constant", "train__save_every": 20}


@pytest.mark.thorough  # tests/unit/ranks/test_watchdog.py has one process
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_job_with_stacks(make_run, rank: int) -> None:
    run = make_run("hangs", train__hang_timeout_s=LIMIT_S, **ENDLESS)
    process = start_again(run)
    try:
        run.wait_for_step(25, process)
        os.kill(run.rank_pids(process.pid)[rank], signal.SIGSTOP)
        began = time.monotonic()
        # limit, the guard's margin of 10 s, and 30 s in which the launcher waits for its ranks at worst
        assert_gone(process.pid, within_s=LIMIT_S + 10 + 30)
        took = time.monotonic() - began
    finally:
        output = end(run, process)
    print(f"rank {rank} stopped: job ended after {took:.1f} s at a limit of {LIMIT_S} s")
    stacks = sorted((run.output_dir / "hangs").iterdir())
    assert [path.stem[-1] for path in stacks] == ["0", "1"], output[-3000:]
    assert all("trainer.py" in path.read_text() for path in stacks), "in a step, or at the log or checkpoint after it"
    hangs = [record for record in run.records("error") if record["status"] == "hang"]
    assert {record["rank"] for record in hangs} == {0, 1}
    assert all(record["limit_s"] == LIMIT_S for record in hangs)
    assert f"has finished nothing for {LIMIT_S} s" in output
    tags = assert_checkpoints_whole(run)
    process = start_again(run)
    try:
        run.wait_for_step(int(tags[-1][5:]) + 5, process)
    finally:
        end(run, process)


@pytest.mark.thorough
def test_slow_work_that_goes_on_is_no_hang(make_run) -> None:
    """The limit is on one micro step, evaluation batch or checkpoint, and not on the whole."""
    run = make_run("slow", train__hang_timeout_s=5, train__steps=1000, train__save_every=20)
    run.finish()
    assert not run.records("error")
    trained_s = sum(record["seconds"] for record in run.steps())
    assert trained_s > 5, "in all it took longer than the limit"
