"""A long run under random faults, against one that nobody disturbed.

MAPDISTILL_SOAK_MINUTES=30 pytest -s tests/faults/test_soak.py
"""

from __future__ import annotations

import collections
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulting import (
    assert_checkpoints_whole,
    assert_gone,
    end,
    output_file,
    processes_of,
    seed_of,
    send,
    start_again,
)
from launching import Run, write_ds_config
from small_disk import SmallDisk, mounted

MINUTES = float(os.environ.get("MAPDISTILL_SOAK_MINUTES", "0"))
pytestmark = [
    pytest.mark.faults,
    pytest.mark.launcher,
    pytest.mark.skipif(not MINUTES, reason="takes as long as MAPDISTILL_SOAK_MINUTES says"),
    pytest.mark.timeout(60 * MINUTES + 1200),
]
HANG_S = 10
ENDS_WITHIN_S = HANG_S + 60
LARGEST_GAP = 1e-5
"""Relative, of a loss after thousands of steps: other ranks and stages add in another order, and that grows."""


class Soak:
    """One run directory, started again and again with other ranks and stages, each start ended by one fault."""

    def __init__(self, run: Run, disk: SmallDisk, rng: random.Random) -> None:
        self.run, self.disk, self.rng = run, disk, rng
        self.starts = 0
        self.tried: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, Callable[[int], str | None]] = {
            "rank killed": self.kill_rank,
            "launcher killed": lambda launcher: send(launcher, signal.SIGKILL),
            "group told to stop": self.preempt,
            "rank stopped": self.stop_rank,
            "disk full": self.fill_disk,
        }
        """Each is given the launcher's pid, and returns what the run will say at its end, if anything."""

    def kill_rank(self, launcher: int) -> None:
        send(self.rng.choice(self.run.rank_pids(launcher)), signal.SIGKILL)

    def stop_rank(self, launcher: int) -> None:
        send(self.rng.choice(self.run.rank_pids(launcher)), signal.SIGSTOP)

    def preempt(self, launcher: int) -> str:
        os.killpg(launcher, signal.SIGTERM)
        return "; the same command continues"

    def fill_disk(self, launcher: int) -> str:
        """Until the run ends: one that was about to remove an old checkpoint has room for all that follow."""
        until = time.monotonic() + ENDS_WITHIN_S
        while processes_of(launcher) and time.monotonic() < until:
            self.disk.fill()
            time.sleep(0.05)
        return "could not be written"

    def damage_newest(self) -> str | None:
        """Between two starts, sometimes: one file of the newest checkpoint, while there is another one. Its name."""
        tags = self.run.run_dir.complete_tags()
        if len(tags) < 2 or self.rng.random() > 0.3:
            return None
        path = self.rng.choice(sorted((self.run.run_dir.checkpoints / tags[-1]).iterdir()))
        kind = self.rng.choice(["byte flipped", "file truncated", "file missing"])
        if kind == "file missing":
            path.unlink()
        elif kind == "file truncated":
            os.truncate(path, self.rng.randrange(path.stat().st_size))
        else:
            data = bytearray(path.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data)
        self.tried[kind] += 1
        return tags[-1]

    def turn(self) -> None:
        self.starts += 1
        process = start_again(self.run, damaged=self.damage_newest())
        name = self.rng.choice(sorted(self.faults))
        try:
            if not self.run.run_dir.complete_tags():
                self.run.wait_for_step(11, process)
            time.sleep(self.rng.uniform(0.5, 5))
            last = self.faults[name](process.pid)
            assert_gone(process.pid, within_s=ENDS_WITHIN_S)
        finally:
            end(self.run, process)
            self.disk.free()
        said = output_file(self.run).read_text()
        assert last is None or last in said, f"{name}: {said}"
        self.tried[name] += 1
        assert assert_checkpoints_whole(self.run), "there is always one to continue from"


def test_soak(make_run, tmp_path: Path) -> None:
    rng = seed_of("soak")
    settings = {
        "micro": 2,
        "train__global_batch": 12,
        "train__steps": 1_000_000,
        "train__schedule": "constant",
        "train__save_every": 10,
        "train__keep": 3,
        "train__lr": 1e-3,
        "train__hang_timeout_s": HANG_S,
    }
    run = make_run("soak", launcher="real", ranks=2, stage=1, **settings)
    began = time.monotonic()
    with mounted(run.run_dir.checkpoints, "20m"):
        soak = Soak(run, SmallDisk(run.run_dir.checkpoints), rng)
        while time.monotonic() - began < 60 * MINUTES:
            run.ranks = rng.choice([1, 2, 2, 3])
            stage = rng.choice([1, 2, 3])
            sections = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
            ds = write_ds_config(tmp_path / f"ds {stage}", **sections)
            run.argv[run.argv.index("--deepspeed_config") + 1] = str(ds)
            soak.turn()
            print(f"{time.monotonic() - began:.0f} s: step {run.steps()[-1]['step']}, {dict(soak.tried)}", flush=True)
    reached = run.steps()[-1]["step"]
    undisturbed = make_run("undisturbed", ranks=2, stage=1, **settings)
    process = start_again(undisturbed, "--train.save_every", "0")
    try:
        undisturbed.wait_for_step(reached, process, within_s=900)
    finally:
        end(undisturbed, process)
    curves = zip(run.curve()[:reached], undisturbed.curve()[:reached], strict=True)
    gaps = [abs(a - b) / b for a, b in curves]
    print(
        f"{sum(soak.tried.values())} faults in {MINUTES:g} min, {soak.starts} starts, {reached} steps; final loss "
        f"{run.curve()[reached - 1]:.6f}, undisturbed {undisturbed.curve()[reached - 1]:.6f}; largest relative gap "
        f"{max(gaps):.1e}, median {sorted(gaps)[len(gaps) // 2]:.1e}"
    )
    assert max(gaps) < LARGEST_GAP
