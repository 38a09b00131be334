"""Processes are told from later ones with their ids, by the guard of a rank as by everyone else."""

from __future__ import annotations

import os
import subprocess
import sys

from engine.ranks import guard
from engine.records.processes import look_up, running_processes, start_ticks


def test_the_guard_which_imports_nothing_of_ours_says_the_same() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert guard.start_ticks(child.pid) == str(start_ticks(child.pid))
    assert child.pid in {process.pid for process in running_processes()}
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert look_up(child.pid, zombies=True) is not None
    assert guard.start_ticks(child.pid) is start_ticks(child.pid) is None
    child.wait()
    assert look_up(child.pid, zombies=True) is None
    assert guard.start_ticks(child.pid) is start_ticks(child.pid) is None
