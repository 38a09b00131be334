"""Where DeepSpeed's operators are compiled, by whom, and what is said where they cannot be."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension

from engine.errors import UserError
from engine.ranks import extension_builds

BUILDER = """
import sys
from torch.utils import cpp_extension
from engine.ranks import extension_builds
extension_builds.SILENT_S = 0.5
extension_builds.prepare()
baton = cpp_extension.FileBaton(sys.argv[1])
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
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns PyTorch's lock of an extension, as `_jit_compile` names it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    extension_builds.prepare()
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    return tmp_path / "cpu_adam" / "lock"


@pytest.fixture
def start(lock: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a builder, which has then said its first word."""
    started = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        assert said(process) == "started"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.faults
def test_those_who_wait_for_a_builder_that_is_killed_build_it(lock: Path, start) -> None:
    holder = start()
    assert said(holder) == "builds", "a lock that is free is taken without a word"
    waiting = [start() for _ in range(2)]
    for process in waiting:
        assert said(process) == f"waiting for another process that compiles cpu_adam in {lock.parent}"
    holder.kill()
    holder.wait()
    ready, _, _ = select.select([process.stdout for process in waiting], [], [], 60)
    first, second = sorted(waiting, key=lambda process: process.stdout not in ready)
    assert said(first) == f"took over {lock}: the process that built this extension has ended; building it again"
    assert said(first) == "builds"
    assert not select.select([second.stdout], [], [], 1.0)[0], "the lock has a holder again"
    first.communicate("")
    assert said(second) == "finds it built"
    assert second.wait(60) == 0
    assert not lock.exists()


@pytest.mark.faults
def test_a_later_start_takes_over_the_lock_of_a_builder_that_was_killed(lock: Path, start) -> None:
    for attempt in range(3):
        builder = start()
        if attempt:
            assert said(builder).startswith("took over")
        assert said(builder) == "builds"
        builder.kill()
        builder.wait()
        assert lock.exists(), "the kill should have left it"


def test_without_file_locks_it_is_as_in_pytorch_and_said(
    lock: Path, no_flock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = cpp_extension.FileBaton(str(lock)), cpp_extension.FileBaton(str(lock))
    assert first.try_acquire()
    assert capsys.readouterr().out == ""
    assert not second.try_acquire()
    assert capsys.readouterr().out == (
        f"{lock.parent}: no file locks there, so this process waits for {lock}: remove it "
        "if no process compiles cpu_adam\n"
    )
    first.release()
    second.wait()


def test_a_minute_of_compiling_is_announced(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where nothing is compiled yet: PyTorch takes its lock at every start."""
    (lock.parent / "cpu_adam.so").unlink()
    said = []
    for _ in range(2):
        baton = cpp_extension.FileBaton(str(lock))
        assert baton.try_acquire()
        said.append(capsys.readouterr().out)
        (lock.parent / "cpu_adam.so").touch()
        baton.release()
    assert said == ["compiling DeepSpeed's operator cpu_adam, once on this machine: up to 3 minutes\n", ""]


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "HOME"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    with pytest.raises(
        UserError, match=rf"{tmp_path}/file/x.*\(Not a directory\); set TORCH_EXTENSIONS_DIR to a folder"
    ):
        extension_builds.prepare()


def test_the_folder_is_the_users_or_one_of_these_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "folder"))
    extension_builds.prepare()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extension_builds.prepare()
    (folder,) = (tmp_path / "cache" / "torch_extensions").iterdir()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)
    assert folder.name.endswith(f"-torch{version('torch')}-deepspeed{version('deepspeed')}")


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(UserError, match=r"with CXX=/bin/false \(Error building extension 'x'\); install a C\+\+"), \
            extension_builds.explain_failures():  # fmt: skip
        raise RuntimeError("Error building extension 'x'\nlong output")
    with (
        pytest.raises(UserError, match=r"No such file or directory: '/no/such/compiler'"),
        extension_builds.explain_failures(),
    ):
        subprocess.run(["/no/such/compiler"])
    with pytest.raises(UserError, match=r"returned non-zero exit status 1"), extension_builds.explain_failures():
        subprocess.run(["/bin/false"], check=True)


def test_an_operator_is_compiled_before_there_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})  # as in a new process
    monkeypatch.setattr(
        cpp_extension.JIT_EXTENSION_VERSIONER, "entries", {}
    )  # or later builds of this process had another name
    with pytest.raises(UserError, match=r"cannot be compiled with CXX=/bin/false"):
        extension_builds.require_operators()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^Address in use$"), extension_builds.explain_failures():
        raise RuntimeError("Address in use")
