"""What must be known before a search: a proxy job that only plans says it, on the slots that the jobs will have."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.records.processes import pid_namespace, start_ticks
from engine.records.records import read_records
from ga.config import SearchConfig
from ga.jobs.launcher import LOG, end_lost_job
from ga.jobs.outcome import JobReport, Outcome
from ga.jobs.pool import JobPool

CHECKS = "checks"
LIMIT_S = 900.0
"""Seconds that a job may take to plan: DeepSpeed may compile its operators first."""
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class ProxyFacts:
    """What a proxy job says of the configuration that it was given."""

    student_layers: int
    teacher_layers: int
    sequences: int
    """Number of sequences of the corpus."""
    seq_len: int
    tasks: tuple[str, ...]
    fingerprint: str
    fingerprint_parts: dict[str, Any]


def ask_proxy(pool: JobPool, config: SearchConfig, *, stop: Callable[[], bool]) -> ProxyFacts | None:
    """Returns None when told to stop. Raises UserError with the job's own words when it does not accept the
    configuration, or was lost twice; its folder is then kept until the next start."""
    checks = config.root / CHECKS
    _remove_abandoned(checks)
    folder = checks / f"{_here()}.{os.getpid()}.{start_ticks(os.getpid())}"  # drivers may start side by side
    report = None
    for _ in range(2):
        report = _run(pool, config, folder, stop=stop)
        if report is None:
            return None
        facts = _planned(folder / LOG)
        if facts is not None:
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another driver's is in there
                checks.rmdir()
            return facts
        if Outcome.LOST not in report.outcomes.values():
            break
    assert report is not None
    raise UserError(f"{report.message} (a proxy job on {pool.placements[0]} said so: {folder / LOG})")


def _run(pool: JobPool, config: SearchConfig, folder: Path, *, stop: Callable[[], bool]) -> JobReport | None:
    job = config.job(output_dir=str(folder.resolve()), genomes=["none"], dry_run=True)
    running = pool.start(pool.placements[0], job)
    while not (done := list(pool.finished(limit_s=LIMIT_S))):
        if stop():
            pool.end(running)
            return None
        time.sleep(LOOK_EVERY_S)
    return done[0][1]


def _planned(log: Path) -> ProxyFacts | None:
    for record in read_records(log):
        if record["kind"] == "run" and record.get("status") == "planned":
            return ProxyFacts(
                student_layers=record["student_layers"],
                teacher_layers=record["teacher_layers"],
                sequences=record["sequences"],
                seq_len=record["seq_len"],
                tasks=tuple(record["tasks"]),
                fingerprint=record["fingerprint"],
                fingerprint_parts=record["fingerprint_parts"],
            )
    return None


def _here() -> str:
    """Returns what tells apart where a process id means one process."""
    inode = pid_namespace().partition("[")[2].rstrip("]")  # containers of one machine may have its name
    return f"{socket.gethostname()}.{inode}"


def _remove_abandoned(checks: Path) -> None:
    """Removes what drivers of this machine have left that died in the middle of a check, or were told what was
    wrong."""
    for folder in checks.glob(f"{_here()}.*.*"):
        pid, started = map(int, folder.name.split(".")[-2:])
        if start_ticks(pid) != started:
            end_lost_job(folder)
            shutil.rmtree(folder, ignore_errors=True)
