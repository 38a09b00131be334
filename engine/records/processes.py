"""What Linux says of processes: enough to tell one from later ones with its id, and from other machines'."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    pid: int
    session: int
    """Session id."""
    started: int
    """Start time in clock ticks after boot."""


def look_up(pid: int, *, zombies: bool) -> Process | None:
    """Returns None when there is no such process (any more). Zombies are over, but not waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    if fields[0] in "ZX" and not zombies:
        return None
    return Process(pid, session=int(fields[3]), started=int(fields[19]))


def running_processes() -> Iterator[Process]:
    """Yields all that run, without zombies."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := look_up(int(name), zombies=False)) is not None:
            yield process


def start_ticks(pid: int) -> int | None:
    """Returns when the process started, in clock ticks after boot; None when it does not run."""
    process = look_up(pid, zombies=False)
    return None if process is None else process.started


def boot_id() -> str:
    """Returns the same for all processes that share a kernel (containers too), and another after a reboot: the kernel's
    id of this boot, or the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def pid_namespace() -> str:
    """Returns the name of the namespace of process ids: containers of one machine cannot look up each other's."""
    return os.readlink("/proc/self/ns/pid")
