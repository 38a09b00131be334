"""What must be known before a search: a proxy job that only plans says it, on the slots that the jobs will have."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import UserError
from engine.records import read_records
from ga.config import SearchConfig
from ga.jobs import JobPool
from ga.launcher import LOG

CHECKS = "checks"
LIMIT_S = 900.0
"""DeepSpeed may compile its operators first."""
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class ProxyFacts:
    """Of the proxy that a configuration describes."""

    student_layers: int
    teacher_layers: int
    sequences: int
    """Of the corpus."""
    seq_len: int
    tasks: tuple[str, ...]
    fingerprint: str
    fingerprint_parts: dict[str, Any]


def ask_proxy(pool: JobPool, config: SearchConfig, *, stop: Callable[[], bool]) -> ProxyFacts | None:
    """None when told to stop. Raises UserError with the job's own words when it does not accept the configuration; its
    folder is then kept."""
    folder = config.root / CHECKS / f"{socket.gethostname()}-{os.getpid()}"  # drivers may start side by side
    job = config.job(output_dir=str(folder.resolve()), genomes=["none"], dry_run=True)
    running = pool.start(pool.placements[0], job)
    while not (done := pool.finished(limit_s=LIMIT_S)):
        if stop():
            pool.end(running)
            return None
        time.sleep(LOOK_EVERY_S)
    for record in read_records(folder / LOG):
        if record["kind"] == "run" and record.get("status") == "planned":
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another driver's is in there
                folder.parent.rmdir()
            return ProxyFacts(
                student_layers=record["student_layers"],
                teacher_layers=record["teacher_layers"],
                sequences=record["sequences"],
                seq_len=record["seq_len"],
                tasks=tuple(record["tasks"]),
                fingerprint=record["fingerprint"],
                fingerprint_parts=record["fingerprint_parts"],
            )
    raise UserError(f"{done[0][1].message} (a proxy job on {running.placement} said so: {folder / LOG})")
