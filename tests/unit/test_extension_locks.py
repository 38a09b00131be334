"""Locks of compiled extensions, taken by PyTorch's own FileBaton in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from engine import extension_locks

HOLDER = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    started = []

    def start(lock: Path) -> subprocess.Popen[str]:
        lock.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(lock)], stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("folder", ["py311_cpu/cpu_adam", "cpu_adam"])  # the latter with TORCH_EXTENSIONS_DIR
def test_a_lock_goes_with_its_holder_and_not_before(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], folder: str
) -> None:
    lock = tmp_path / folder / "lock"
    holder = hold(lock)
    assert extension_locks.remove_stale(tmp_path) == []
    assert lock.exists()

    holder.kill()
    holder.wait()
    assert not FileBaton(str(lock)).try_acquire(), "the kill should have left the lock"
    assert extension_locks.remove_stale(tmp_path) == [lock]
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
    assert extension_locks.remove_stale(tmp_path) == []


def test_a_holder_in_another_container_counts(tmp_path: Path) -> None:
    """Its process ids are hidden from us, but it shares the cache folder."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no process namespaces here (they need root and util-linux)")
    lock.touch()
    check = f"""
import sys
from pathlib import Path
from engine import extension_locks
lock = Path({str(lock)!r})
assert lock not in set(extension_locks._open_files()), "this test needs a holder that cannot be seen"
print(extension_locks.remove_stale(lock.parent.parent))
"""

    def removed() -> str:
        return subprocess.run([*apart, sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout

    with lock.open("rb"):  # by this process, which is outside
        assert removed() == "[]\n"
        assert lock.exists()
    assert removed() == f"[{lock!r}]\n"


def test_on_a_network_file_system_the_build_must_have_been_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(extension_locks, "NETWORK_FILE_SYSTEMS", ("",))  # every file system is one
    assert extension_locks.remove_stale(tmp_path) == []

    (lock.parent / "adam.o").touch()
    long_ago = time.time() - extension_locks.QUIET_S - 60
    os.utime(lock, (long_ago, long_ago))
    assert extension_locks.remove_stale(tmp_path) == [], "another host has just written an object file"
    os.utime(lock.parent / "adam.o", (long_ago, long_ago))
    assert extension_locks.remove_stale(tmp_path) == [lock]


def test_without_a_build_folder_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert extension_locks.remove_stale(tmp_path / "absent") == []
