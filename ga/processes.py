"""What Linux says of processes: enough to tell one from a later one with the same id."""

from __future__ import annotations

from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None when it does not run (zombies do not)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """The kernel's id of this boot: another machine, or this one after a reboot, has another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
