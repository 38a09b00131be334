"""What Linux says of processes: enough to tell one from a later one with the same id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    pid: int
    session: int
    started: int
    """In clock ticks after boot."""


def look_up(pid: int, *, zombies: bool) -> Process | None:
    """None when there is no such process (any more). Zombies are over, but not waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    if fields[0] in "ZX" and not zombies:
        return None
    return Process(pid, session=int(fields[3]), started=int(fields[19]))


def running() -> Iterator[Process]:
    """All that run; without zombies."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := look_up(int(name), zombies=False)) is not None:
            yield process


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None when it does not run."""
    process = look_up(pid, zombies=False)
    return None if process is None else process.started


def boot_id() -> str:
    """The kernel's id of this boot: another machine, or this one after a reboot, has another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
