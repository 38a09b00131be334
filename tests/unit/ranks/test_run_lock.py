"""Who may write in a run directory; two real starts in one are in tests/faults/test_damage.py."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.ranks import run_lock
from engine.records.processes import start_ticks

pytestmark = pytest.mark.faults


def test_a_second_holder_is_refused_until_the_first_releases(tmp_path: Path) -> None:
    first = run_lock.acquire(tmp_path / "new" / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing there"):
        run_lock.acquire(tmp_path / "new" / "run")
    first.release()
    second = run_lock.acquire(tmp_path / "new" / "run")
    assert second.taken_from is None
    second.release()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from engine.ranks import run_lock"
    code += "; run_lock.acquire(Path(sys.argv[1]))"
    holder = subprocess.run([sys.executable, "-c", f"{code}; print(os.getpid(), flush=True); os._exit(0)", tmp_path],
                            capture_output=True, text=True, check=True)  # fmt: skip
    lock = run_lock.acquire(tmp_path)
    assert lock.taken_from is not None
    assert lock.taken_from.startswith(f"process {holder.stdout.strip()} on ")
    lock.release()


def write_holder(folder: Path, **holder: object) -> None:
    (folder / run_lock.FILE).write_text(json.dumps({"host": "worker-7", "pid": 12, "since": "noon", **holder}) + "\n")


def test_another_machine_is_watched_for_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "QUIET_S", 0.6)
    write_holder(tmp_path, machine="another", beats=1)
    lock = run_lock.acquire(tmp_path)
    assert lock.taken_from == "process 12 on worker-7, since noon"
    lock.release()

    write_holder(tmp_path, machine="another", beats=1)
    threading.Timer(0.2, lambda: write_holder(tmp_path, machine="another", beats=2)).start()
    with pytest.raises(UserError, match=r"process 12 on worker-7 \(since noon\) is writing there"):
        run_lock.acquire(tmp_path)


def test_where_there_is_no_flock_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "QUIET_S", 0.6)
    first = run_lock.acquire(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing there"):
        run_lock.acquire(tmp_path)
    first.release()
    run_lock.acquire(tmp_path).release()


HOLDER = """
import subprocess, sys, time
from pathlib import Path
import psutil
from engine.ranks import run_lock, watchdog

launcher = psutil.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
watchdog.launchers = lambda: (launcher,)
run_lock.acquire(Path(sys.argv[1]))
print(launcher.pid, flush=True)
while launcher.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.05)
time.sleep(2)  # the rank's last checkpoint; nobody has waited for the launcher
"""


def test_a_start_waits_for_a_holder_whose_launcher_was_killed(tmp_path: Path) -> None:
    """And for no other."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    launcher = int(holder.stdout.readline())
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is writing there"):
        run_lock.acquire(tmp_path)
    os.kill(launcher, signal.SIGKILL)
    until = time.monotonic() + 10
    while start_ticks(launcher) is not None:
        assert time.monotonic() < until
    lock = run_lock.acquire(tmp_path)
    assert lock.taken_from is not None
    lock.release()
    holder.communicate()


def test_signs_of_life_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    lock = run_lock.acquire(tmp_path)
    seen = set()
    for _ in range(200):
        lines = (tmp_path / run_lock.FILE).read_text().splitlines()
        assert len(lines) == 1
        seen.add(json.loads(lines[0])["beats"])
        if len(seen) > 12:
            break
        threading.Event().wait(0.02)
    lock.release()
    assert len(seen) > 12
    assert (tmp_path / run_lock.FILE).read_text() == ""


@pytest.mark.parametrize("text", ["{", "not json\n", "[]\n", '{"pid": "x"}\n'])
def test_an_unreadable_lock_file_is_a_stale_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "QUIET_S", 0.2)
    (tmp_path / run_lock.FILE).write_text(text)
    lock = run_lock.acquire(tmp_path)
    assert lock.taken_from is not None
    lock.release()
