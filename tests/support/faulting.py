"""Injecting faults into real runs, and looking at what they leave."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from launching import Run, kill_session

from engine.records.records import read_records
from engine.records.run_dir import COMPLETE
from engine.train.checkpoint_files import problems_of

TIMES = int(os.environ.get("MAPDISTILL_FAULTS", "1"))
"""How often each random fault is tried; docs/reliability.md reports 20."""


def seed_of(name: str) -> random.Random:
    """The random moments of a test: others in every run, and printed, so that one can be repeated."""
    seed = int(os.environ.get("MAPDISTILL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"{name}: MAPDISTILL_FAULT_SEED={seed}")
    return random.Random(f"{name} {seed}")


def processes_of(session: int) -> list[psutil.Process]:
    """Every living process of a launcher's session: launcher, ranks, their guards."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def assert_gone(session: int, within_s: float) -> None:
    until = time.monotonic() + within_s
    while left := processes_of(session):
        if time.monotonic() > until:
            raise AssertionError(f"still there after {within_s:g} s: {[(p.pid, p.cmdline()[-12:]) for p in left]}")
        time.sleep(0.1)


def assert_checkpoints_whole(run: Run) -> list[str]:
    """Every folder that says it is complete must be; returns their names."""
    tags = run.run_dir.complete_tags()
    for tag in tags:
        folder = run.run_dir.checkpoints / tag
        marker = json.loads((folder / COMPLETE).read_text())
        assert problems_of(folder, marker["files"]) == []
    return tags


def unfinished_checkpoints(run: Run) -> int:
    """How many a kill has left half written; the next start removes them."""
    return len([f for f in run.run_dir.checkpoints.glob("step-*") if f.name not in run.run_dir.complete_tags()])


def output_file(run: Run) -> Path:
    return run.output_dir.with_name(f"{run.output_dir.name}.log")


def wait_for_start(output: Path, process: subprocess.Popen[str], *, within_s: float = 400) -> dict[str, Any]:
    """The `started` record of the start that writes to `output`, once it is there. Not from records.jsonl: a start
    without a checkpoint renames that of the start before."""
    until = time.monotonic() + within_s
    while True:
        records = read_records(output) if output.is_file() else []
        for record in records:
            if record["kind"] == "run" and record["status"] == "started":
                return record
        assert process.poll() is None, output.read_text()[-4000:]
        assert time.monotonic() < until, output.read_text()[-4000:]
        time.sleep(0.05)


def start_again(run: Run, *more: str, damaged: str | None = None) -> subprocess.Popen[str]:
    """Starts the run, waits until it trains, and checks that it goes on from its newest complete checkpoint that is not
    `damaged`."""
    whole = [tag for tag in run.run_dir.complete_tags() if tag != damaged]
    expected = whole[-1] if whole else None
    with output_file(run).open("w") as output:
        process = run.start(*more, output=output)
    try:
        assert wait_for_start(output_file(run), process)["resumed_from"] == expected
    except BaseException:
        kill_session(process)
        raise
    return process


def end(run: Run, process: subprocess.Popen[str]) -> str:
    """Ends what is left of a start; returns its output."""
    kill_session(process)
    process.wait()
    return output_file(run).read_text()


def send(pid: int, number: int) -> None:
    """To a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
