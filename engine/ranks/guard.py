"""A small process beside each rank, for what the rank cannot do itself:

- stop the rank when its launcher is gone, or whoever reads its output (an ssh session). A launcher that is killed (by
  the kernel's out-of-memory killer, say) leaves its ranks running, with nobody to end them, and the next start refused;
- end the rank when it is stopped or stuck so deeply that its own watchdog (engine/ranks/watchdog.py) does not act.

    python -I -S guard.py RANK_PID LAUNCHER_PIDS HEARTBEAT_FD     (started by engine/ranks/watchdog.py)

Standard library only and no imports of ours: about 8 MiB, and it must not depend on what it watches.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import struct
import sys
import time

HEARTBEAT = struct.Struct("=dd")
"""Start of the shared memory: time.monotonic() of the last beat, and the limit in seconds (0: not watched now). The
clock is the same for all processes of a machine."""
LOOK = struct.Struct("=d")
"""Rest of it: time.monotonic() of the guard's last look; 0: there is no guard."""
SHARED_BYTES = HEARTBEAT.size + LOOK.size
MARGIN_S = 10.0
"""Seconds beyond a rank's limit: its own watchdog comes first."""
WAKES_WITHIN_S = 5.0
"""Seconds that a rank that was stopped (SIGSTOP), once continued, has to write its stacks and end. Then faulthandler is
made to write them (SIGABRT), also while something holds Python's lock, and then it is killed."""
GRACE_S = 30.0
"""Seconds for a checkpoint, once the launcher is gone."""
POLL_S = 1.0
PAUSED_S = 5.0
"""Seconds after which a guard that could not look was stopped together with its rank (Ctrl-Z, a scheduler's suspend, a
machine that slept), which is no hang."""


def start_ticks(pid: int) -> str | None:
    """Returns the start time of a process, which tells it from a later one with the same number; None when it is gone
    (one that nobody has waited for is). The same as engine/records/processes.py:start_ticks, which is not imported
    here."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Process:
    """Another process, by pid. Its end wakes `select.poll`, where the kernel has pidfds (Linux 5.3)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start = start_ticks(pid)
        try:
            self.fd: int | None = os.pidfd_open(pid)
        except OSError:
            self.fd = None

    def is_gone(self) -> bool:
        """Returns whether it has ended, also where another process has its number now."""
        return self._start is None or start_ticks(self.pid) != self._start

    def send(self, number: int) -> None:
        """Sends a signal, unless the process is gone."""
        if not self.is_gone():
            os.kill(self.pid, number)


def is_overdue(heartbeat: mmap.mmap) -> bool:
    """Returns whether the rank's own watchdog should have ended it by now."""
    last, limit = HEARTBEAT.unpack_from(heartbeat)
    return bool(limit > 0 and time.monotonic() > last + limit + MARGIN_S)


def look(heartbeat: mmap.mmap) -> None:
    """Notes that the guard is here and looks. After a pause, time begins anew for the rank too."""
    (before,) = LOOK.unpack_from(heartbeat, HEARTBEAT.size)
    now = time.monotonic()
    if before and now - before > PAUSED_S:
        LOOK.pack_into(heartbeat, 0, now)  # first: the rank reads them the other way round
    LOOK.pack_into(heartbeat, HEARTBEAT.size, now)


def say(text: str) -> None:
    """Prints a line, where anybody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return  # whoever read our output is gone too


def end_orphan(rank: Process) -> str:
    """Ends a rank as a scheduler would, so that one that trains finishes its step and writes a checkpoint. Returns what
    was done."""
    rank.send(signal.SIGTERM)
    return "asked to stop" if wait_or_kill(rank, GRACE_S) else "asked to stop and then killed"


def wait_or_kill(rank: Process, seconds: float) -> bool:
    """Returns whether the rank ends by itself within this time; kills it where it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if rank.is_gone():
            return True
        time.sleep(0.1)
    rank.send(signal.SIGKILL)
    return False


def end_stuck(rank: Process) -> None:
    """Continues a rank that was stopped, makes it write its stacks, and kills it."""
    rank.send(signal.SIGCONT)
    until = time.monotonic() + WAKES_WITHIN_S
    while time.monotonic() < until and not rank.is_gone():
        time.sleep(0.1)
    rank.send(signal.SIGABRT)
    wait_or_kill(rank, WAKES_WITHIN_S)


def main(rank: Process, launchers: list[Process], heartbeat: mmap.mmap) -> None:
    """Watches until the rank has ended, by itself or by this process."""
    poll = select.poll()
    for process in (rank, *launchers):
        if process.fd is not None:
            poll.register(process.fd, select.POLLIN)
    output = sys.stdout.fileno()
    poll.register(output, 0)  # POLLERR and POLLHUP come unasked
    look(heartbeat)  # at once: a pause in the first second is one too
    while True:
        events = dict(poll.poll(POLL_S * 1000))
        look(heartbeat)
        if rank.is_gone():
            return
        if output in events:  # a pipe without a reader; a file or a terminal has none of these
            end = end_orphan(rank)
            say(f"nothing reads the output of rank process {rank.pid} any more; it was {end}")
            return
        dead = [process for process in launchers if process.is_gone()]
        if dead:
            time.sleep(0.5)  # an orderly end: the launcher has ended its ranks before itself
            if not rank.is_gone():
                end = end_orphan(rank)
                say(f"the launcher (process {dead[0].pid}) has ended; its rank (process {rank.pid}) was {end}")
            return
        if is_overdue(heartbeat):
            end_stuck(rank)
            say(f"error: rank process {rank.pid} did not act on its time limit; it was continued, and then killed")
            return


if __name__ == "__main__":
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # sent to the whole group; this process ends with its rank
    with mmap.mmap(int(sys.argv[3]), SHARED_BYTES) as shared:
        main(Process(int(sys.argv[1])), [Process(int(pid)) for pid in sys.argv[2].split(",") if pid], shared)
