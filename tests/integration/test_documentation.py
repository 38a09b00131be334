"""Commands of the documentation, run on the quick start's real teacher and text (`make data`)."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, environment, free_port

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path, program: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) + re.findall(
        r"^    (\S.*)$", text, flags=re.MULTILINE
    )
    return [line for block in blocks for line in block.splitlines() if line.startswith(program)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


needs_quickstart = pytest.mark.skipif(
    not (ROOT / "data" / "news" / "manifest.json").is_file() or not (ROOT / "models" / "all-MiniLM-L6-v2").is_dir(),
    reason="the quick start's teacher and text are not here: run `make data`",
)
DISTILL = [c for d in DOCUMENTS for c in commands(d, "deepspeed")]


@needs_quickstart
@pytest.mark.launcher
@pytest.mark.parametrize("command", DISTILL)
def test_distill_commands_pass_every_check_up_to_the_banner(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    bare = words == ["deepspeed", "launch/distill.py"]
    words[1:1] = ["--master_port", str(free_port())]
    extra = ["--config", "examples/quickstart.yaml"] if bare else []
    done = run([*words, *extra, "--dry_run", "--output_dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "student layer" in done.stdout
    assert not (tmp_path / "run").exists()


@needs_quickstart
def test_prepare_command_finds_its_work_done() -> None:
    for command in {c for d in DOCUMENTS for c in commands(d, "python launch/prepare_data.py --config")}:
        done = run(shlex.split(command))
        assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    targets = {c for d in DOCUMENTS for c in re.findall(r"`?make (\w+)`?", d.read_text(encoding="utf-8"))} & {
        "demo", "test", "lint", "data", "docs", "format", "install",
    }  # fmt: skip
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        assert run(["make", "-n", target]).returncode == 0, target


def test_links_and_named_files_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"
        for name in re.findall(r"`((?:engine|launch|examples|ds_configs|benchmarks|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_there_are_commands_to_test() -> None:
    assert len(DISTILL) >= 3
