"""The wheel, in an environment of its own and far from the repository: its command distils."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from launching import ROOT, environment
from tiny_world import TinyWorld

from engine.records.records import final_result, read_records

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
FOLDERS = ("ds_configs", "examples", "launch")
OFFLINE = ["-q", "--no-deps", "--no-index"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, since setuptools leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("engine", "ga", *FOLDERS):
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources" / name)
    subprocess.run([*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, folder / "sources"], check=True)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_has_all_packages_and_the_folders_that_belong_to_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("engine", "ga"):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert {name for name in names if name.startswith(f"{package}/")} == expected
    for folder in FOLDERS:
        listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {f"mapdistill/{name}" for name in listed.stdout.split()} <= names


@pytest.mark.launcher
@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--num_accelerators", 2], marks=pytest.mark.thorough)],  # the launcher imports torch twice more
    ids=["one process", "launcher"],
)
def test_an_installation_distils_from_an_empty_folder(
    options: list[object], wheel: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """With a DeepSpeed file of the installation; the launcher's noise is not shown."""
    home, empty = tmp_path / "env", tmp_path / "empty"
    venv.create(home, with_pip=False)
    subprocess.run([*PIP, "--python", home / "bin" / "python", "install", *OFFLINE, wheel], check=True)
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind the installation
    empty.mkdir()
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}

    def mapdistill(*words: object) -> subprocess.CompletedProcess[str]:
        command = [home / "bin" / "mapdistill", *map(str, words)]
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)

    bare = mapdistill("distill")
    assert bare.returncode == 2
    assert f"{packages}/mapdistill/examples/quickstart_data.py` and `mapdistill prepare_data --config" in bare.stderr
    words = ["distill", *options, "--teacher.path", tiny_world.teacher, "--data.path", tiny_world.corpus]
    words += ["--data.eval_sequences", 8, "--train.steps", 2, "--train.global_batch", 4, "--output_dir", "run"]
    done = mapdistill(*words, "--deepspeed_config", "ds_configs/zero2_fp32.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("settings    the defaults; command line: teacher.path=")
    assert "launcher" not in done.stderr
    assert f"ZeRO stage 2 ({packages}/mapdistill/ds_configs/zero2_fp32.json)" in done.stdout
    result = final_result(read_records(empty / "run" / "records.jsonl"))
    assert result is not None
    assert result["step"] == 2
    assert (empty / "run" / "student" / "model.safetensors").is_file()
