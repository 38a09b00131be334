"""What is said where DeepSpeed's operators cannot be compiled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER

from engine.errors import UserError
from engine.ranks import extension_builds


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "HOME"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    with pytest.raises(
        UserError, match=rf"{tmp_path}/file/x.*\(Not a directory\); set TORCH_EXTENSIONS_DIR to a folder"
    ):
        extension_builds.require_folder()


def test_a_folder_that_can_be_written_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "folder"))
    extension_builds.require_folder()
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(UserError, match=r"with CXX=/bin/false \(Error building extension 'x'\); install a C\+\+"), \
            extension_builds.explained():  # fmt: skip
        raise RuntimeError("Error building extension 'x'\nlong output")
    with (
        pytest.raises(UserError, match=r"No such file or directory: '/no/such/compiler'"),
        extension_builds.explained(),
    ):
        subprocess.run(["/no/such/compiler"])
    with pytest.raises(UserError, match=r"returned non-zero exit status 1"), extension_builds.explained():
        subprocess.run(["/bin/false"], check=True)


def test_an_operator_is_compiled_before_there_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})  # as in a new process
    monkeypatch.setattr(JIT_EXTENSION_VERSIONER, "entries", {})  # or later builds of this process had another name
    with pytest.raises(UserError, match=r"cannot be compiled with CXX=/bin/false"):
        extension_builds.require_operators()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^Address in use$"), extension_builds.explained():
        raise RuntimeError("Address in use")
