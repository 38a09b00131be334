"""Injecting faults into real runs, and looking at what they leave."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from launching import Run, kill_session

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


def starts_of(run: Run) -> list[dict[str, Any]]:
    """The `started` records of records.jsonl."""
    return [record for record in run.records("run") if record["status"] == "started"]


def wait_for_start(
    run: Run, output: Path, process: subprocess.Popen[str], *, earlier: int, within_s: float = 400
) -> dict[str, Any]:
    """The `started` record of the start that writes to `output`, once it is there. earlier: number of those before it,
    which a start without a checkpoint puts aside before its banner."""
    until = time.monotonic() + within_s
    while True:
        text = output.read_text() if output.is_file() else ""
        banner = re.search(r"\bstart {7}(fresh|continues)", text)
        if banner is not None and len(starts_of(run)) > (0 if banner.group(1) == "fresh" else earlier):
            return starts_of(run)[-1]
        assert process.poll() is None, output.read_text()[-4000:]
        assert time.monotonic() < until, output.read_text()[-4000:]
        time.sleep(0.05)


def start_again(run: Run, *more: str, damaged: str | None = None) -> subprocess.Popen[str]:
    """Starts the run, waits until it trains, and checks that it goes on from its newest complete checkpoint that is not
    `damaged`."""
    whole = [tag for tag in run.run_dir.complete_tags() if tag != damaged]
    expected = whole[-1] if whole else None
    earlier = len(starts_of(run))
    with output_file(run).open("w") as output:
        process = run.start(*more, output=output)
    try:
        assert wait_for_start(run, output_file(run), process, earlier=earlier)["resumed_from"] == expected
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
