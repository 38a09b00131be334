"""Locks of compiled extensions, taken by PyTorch's own FileBaton in processes of their own."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.ranks import extension_locks

HOLDER = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""

ONE_WHO_WAITS = """
import sys
from torch.utils.file_baton import FileBaton
from engine.ranks import extension_locks
extension_locks.take_over_stale()
baton = FileBaton(sys.argv[1])
print("started", flush=True)
ours = baton.try_acquire()
print("builds" if ours else "finds it built", flush=True)
if ours:
    sys.stdin.read()
    baton.release()
else:
    baton.wait()
"""


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], subprocess.Popen[str]]]:
    """start(program, lock): once it has said its first word."""
    started = []

    def start(program: str, lock: Path) -> subprocess.Popen[str]:
        lock.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(lock)], stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        started.append(process)
        assert said(process) in ("held", "started")
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def silent(process: subprocess.Popen[str], for_s: float) -> bool:
    assert process.stdout is not None
    return not select.select([process.stdout], [], [], for_s)[0]


@pytest.mark.faults
def test_those_who_wait_for_a_builder_that_is_killed_build_it(tmp_path: Path, start) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    holder = start(HOLDER, lock)
    waiting = [start(ONE_WHO_WAITS, lock) for _ in range(2)]
    assert silent(waiting[0], 2 * extension_locks.LOOK_S), "a lock does not go before its holder"
    assert silent(waiting[1], 0)

    holder.kill()
    holder.wait()
    ready, _, _ = select.select([process.stdout for process in waiting], [], [], 60)
    first, second = sorted(waiting, key=lambda process: process.stdout not in ready)
    assert said(first) == f"took over {lock}: whoever built this extension is gone; building it"
    assert said(first) == "builds"
    assert silent(second, 2 * extension_locks.LOOK_S), "the lock has a holder again"
    first.communicate("")
    assert said(second) == "finds it built"
    assert second.wait(60) == 0
    assert not lock.exists()


@pytest.mark.faults
def test_a_later_start_takes_over_the_lock_of_a_builder_that_was_killed(tmp_path: Path, start) -> None:
    lock = tmp_path / "cpu_adam" / "lock"  # where TORCH_EXTENSIONS_DIR is set, there is one folder less
    holder = start(HOLDER, lock)
    holder.kill()
    holder.wait()
    assert lock.exists(), "the kill should have left the lock"
    later = start(ONE_WHO_WAITS, lock)
    assert said(later).startswith("took over")
    assert said(later) == "builds"
    later.kill()
    later.wait()
    assert said(start(ONE_WHO_WAITS, lock)).startswith("took over"), "the second builder was killed as well"


def test_a_lock_that_is_free_is_taken_without_a_word(tmp_path: Path, start) -> None:
    assert said(start(ONE_WHO_WAITS, tmp_path / "cpu_adam" / "lock")) == "builds"


def test_a_holder_in_another_container_counts(tmp_path: Path) -> None:
    """Its process ids are hidden from us, but it shares the cache folder."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no process namespaces here (they need root and util-linux)")
    lock.touch()
    check = f"""
from pathlib import Path
from engine.ranks import extension_locks
lock = Path({str(lock)!r})
assert lock not in set(extension_locks._open_files()), "this test needs a holder that cannot be seen"
print(extension_locks._taken_over(lock))
"""

    def taken_over() -> str:
        return subprocess.run([*apart, sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout

    with lock.open("rb"):  # by this process, which is outside
        before = lock.stat().st_ino
        assert taken_over() == "None\n"
        assert lock.stat().st_ino == before
    assert int(taken_over()) > 2, "a descriptor"


def test_on_a_network_file_system_the_build_must_have_been_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(extension_locks, "NETWORK_FILE_SYSTEMS", ("",))  # every file system is one
    assert extension_locks._taken_over(lock) is None

    (lock.parent / "adam.o").touch()
    long_ago = time.time() - extension_locks.QUIET_S - 60
    os.utime(lock, (long_ago, long_ago))
    assert extension_locks._taken_over(lock) is None, "another host has just written an object file"
    os.utime(lock.parent / "adam.o", (long_ago, long_ago))
    descriptor = extension_locks._taken_over(lock)
    assert descriptor is not None
    os.close(descriptor)
