"""What ends a process that hangs; whole jobs are in tests/faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.ranks import guard

HANG = """
import ctypes, sys, time
from pathlib import Path
from engine.ranks import guard, watchdog

def stuck_here():
    {how}

with watchdog.watch(3.0, Path(sys.argv[1]), lambda: print("reported", flush=True)):
    until = time.monotonic() + 4.5
    while time.monotonic() < until:  # longer than the limit, but something is finished all the time
        watchdog.beat()
        time.sleep(0.1)
    print("worked", flush=True)
    stuck_here()
"""


def hang(tmp_path: Path, how: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    command = [sys.executable, "-c", HANG.format(how=how), str(tmp_path / "stacks" / "rank.txt")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60), time.monotonic() - began


def test_a_hanging_thread_is_ended_with_its_stacks(tmp_path: Path) -> None:
    process, took = hang(tmp_path, "time.sleep(1000)")
    assert process.returncode == 1
    assert process.stdout.split("\n")[:2] == ["worked", "reported"]
    assert "in stuck_here" in (tmp_path / "stacks" / "rank.txt").read_text()
    assert "in stuck_here" in process.stderr
    assert took > 7


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard process is for Linux")
def test_one_that_holds_pythons_lock_is_ended_by_its_guard(tmp_path: Path) -> None:
    """Nothing of Python runs in it any more: PyDLL keeps the lock during the call."""
    process, took = hang(tmp_path, "ctypes.PyDLL(None).sleep(1000)")
    assert process.returncode == -signal.SIGABRT
    assert "in stuck_here" in process.stderr
    assert "did not act on its time limit" in process.stderr
    assert took > 7 + guard.MARGIN_S


PAUSED = """
import sys, time
from pathlib import Path
from engine.ranks import guard, watchdog

# a longer limit than PAUSED_S: this machine may halt for a moment, too, and that is then no hang either
with watchdog.watch(6.0, Path(sys.argv[1]), lambda: print("reported", flush=True)):
    while not guard.LOOK.unpack_from(watchdog._heartbeat, guard.HEARTBEAT.size)[0]:
        watchdog.beat()
        time.sleep(0.05)
    until = time.monotonic() + 13  # 11 of them stopped, be it before the first sleep
    print("go", flush=True)
    while time.monotonic() < until:
        time.sleep(0.05)
    print("done", flush=True)
"""


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard process is for Linux")
def test_a_job_that_was_stopped_as_a_whole_is_no_hang(tmp_path: Path) -> None:
    """Ctrl-Z and `fg`, a scheduler's suspend, a machine that slept."""
    command = [sys.executable, "-c", PAUSED, str(tmp_path / "stacks")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(11)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "done\n"
    assert process.returncode == 0


def test_no_limit_means_no_watch(tmp_path: Path) -> None:
    code = HANG.replace("3.0", "0").format(how="time.sleep(1.5)")
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert process.returncode == 0


EVALUATION = """
import sys, time
from pathlib import Path
from types import SimpleNamespace as Some

import torch
from engine.config.distill import TrainConfig
from engine.ranks import watchdog
from engine.data.batch import Counts
from engine.jobs.distill.held_out import HeldOutLosses

class Engine:
    def eval(self): pass
    def train(self): pass
    def __call__(self, batch, features, counts):
        time.sleep(0.4)
        return torch.tensor(1.0), torch.tensor([1.0])

batch = Some(counts=Counts(sequences=1))
batch.to = lambda device: batch
monitor = Some(held_out=lambda step, total, terms: print("total", total, flush=True))
runtime = Some(device=torch.device("cpu"), world_size=1)
execution = Some(micro_batch_size=1)
trainee = Some(model=Engine(), runtime=runtime, execution=execution, monitor=monitor)
loader = Some(held_out_batches=lambda size: [batch] * 10)
with watchdog.watch(2.0, Path(sys.argv[1]), lambda: print("reported", flush=True)):
    HeldOutLosses(TrainConfig(eval_every=1), trainee, lambda batch: None, loader, names=("one",))(1)
"""


def test_a_long_evaluation_is_no_hang(tmp_path: Path) -> None:
    """4 s of batches of 0.4 s, at a limit of 2 s."""
    command = [sys.executable, "-c", EVALUATION, str(tmp_path / "stacks")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "total 10.0\n"
