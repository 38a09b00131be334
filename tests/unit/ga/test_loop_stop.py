"""How a driver is told to stop: real signals to a real process with a real job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import hear_signals
from launching import ROOT

from engine.errors import EXIT_PREEMPTED
from engine.records.processes import start_ticks
from ga.jobs.launcher import end_lost_job

JOB = """
import os, pathlib, signal, sys, time
def end(number, frame):
    time.sleep(1)
    pathlib.Path("ended in order").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(600)
"""
DRIVER = f"""
import sys, time
from pathlib import Path
from engine.errors import EXIT_PREEMPTED
from ga.jobs.pool import JobPool, Running
from ga.jobs.launcher import Job
from ga.jobs.slots import LOCAL, Placement, Slot
from ga.loop import StopSignals

folder = Path(sys.argv[1])
place = Placement((Slot(LOCAL, (0,)),), on_cpu=True)
pool = JobPool([place], launcher="pdsh", hostfile=None, limit_s=60)
job = Job.start([sys.executable, "-c", {JOB!r}], job_dir=folder, added={{}}, cwd=folder)
pool.running.append(Running(place, folder, (), job, time.monotonic()))
with StopSignals(pool) as stop:
    (folder / "ready").touch()
    while not stop.requested:
        time.sleep(0.02)
    pool.end_all()
    sys.exit(EXIT_PREEMPTED)
"""


@pytest.fixture
def driver(tmp_path: Path):
    """A driver on a terminal of its own, and that terminal's other end."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "ready").exists() and (tmp_path / "pid").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process, ours
    process.kill()
    process.wait()
    end_lost_job(tmp_path)


@pytest.mark.faults
def test_a_terminal_that_goes_ends_the_jobs_in_order(driver, tmp_path: Path) -> None:
    process, terminal = driver
    os.close(terminal)  # writing to the other end is EIO from now on
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert process.wait(30) == EXIT_PREEMPTED
    assert (tmp_path / "ended in order").exists(), "the second hang-up killed the job"
    assert start_ticks(int((tmp_path / "pid").read_text())) is None


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_the_jobs(driver, tmp_path: Path, second: signal.Signals) -> None:
    process, terminal = driver
    process.send_signal(signal.SIGHUP)
    said = os.read(terminal, 1000)
    assert b"jobs are told to end; a second signal kills them" in said
    process.send_signal(second)
    assert process.wait(30) == EXIT_PREEMPTED
    assert not (tmp_path / "ended in order").exists()
    assert start_ticks(int((tmp_path / "pid").read_text())) is None
    os.close(terminal)
