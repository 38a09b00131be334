"""`mapdistill`: what it starts, and what it says without starting anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from launching import environment as launch_environment

import engine
from engine.config.places import RANKED
from engine.errors import UserError
from ga import cli

COMMANDS = ("distill", "finetune", "proxy", "search", "export", "measure", "score", "prepare_data", "check_hosts")
CHANGE_WHAT_A_RANK_IS = {"module", "no_python", "no_local_rank", "autotuning"}


def mapdistill(*words: str, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-P", "-c", "import sys; from ga.cli import main; sys.exit(main())", *words]
    env = launch_environment() | {"PYTHONPATH": path}
    return subprocess.run(program, env=env, capture_output=True, text=True, timeout=60)


def test_every_script_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(COMMANDS) == sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in usage
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--version"])
        assert end.value.code == 0
    assert capsys.readouterr().out == f"mapdistill {engine.__version__}\n" * len(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mapdistill {engine.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["distil"], "error: unknown command 'distil'; did you mean 'distill'?"),
        (["prepare-data"], "error: unknown command 'prepare-data'; did you mean 'prepare_data'?"),
        (["--config"], f"error: unknown command '--config'; there are {', '.join(COMMANDS)}"),
        (["finetune", "--num_gpus"], "error: --num_gpus: a value is missing"),
        (["export", "--output_dir", "x"], "error: run is missing; write --run VALUE, or run in a file"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err == says + "\n"


def test_without_launcher_options_one_process_is_the_rank() -> None:
    done = mapdistill("distill", "--loss.hiden", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown setting 'loss.hiden'; did you mean 'loss.hidden'?\n"


@pytest.mark.parametrize(
    ("words", "options", "others"),
    [
        (["--seed", "3"], [], ["--seed", "3"]),
        (
            ["--num_accelerators", "2", "--seed", "3", "--no_ssh", "--genomes", "uniform", "last", "--include=a:0"],
            ["--num_accelerators", "2", "--no_ssh", "--include=a:0"],
            ["--seed", "3", "--genomes", "uniform", "last"],
        ),
        (["--search.launcher", "pdsh", "--data.include"], [], ["--search.launcher", "pdsh", "--data.include"]),
    ],
)
def test_options_of_the_launcher_are_told_from_settings(
    words: list[str], options: list[str], others: list[str]
) -> None:
    assert cli.split_launcher_options(words) == (options, others)


def test_the_launcher_has_the_options_that_are_passed_on() -> None:
    from deepspeed.launcher.runner import parse_args

    words = [*cli.LAUNCHER_SWITCHES, *(word for name in cli.LAUNCHER_VALUES for word in (name, "1"))]
    words[words.index("--log_level") + 1] = "info"
    known = set(vars(parse_args([*words, "script.py"])))
    ours = {name.removeprefix("--") for name in (*cli.LAUNCHER_SWITCHES, *cli.LAUNCHER_VALUES)}
    assert known - {"user_script", "user_args"} == ours - {"num_accelerators"} | CHANGE_WHAT_A_RANK_IS
    with pytest.raises(UserError):
        cli.split_launcher_options(["--log_level"])


@pytest.mark.parametrize("shadow", ["engine.py", "engine/__init__.py"])
def test_another_engine_is_named(shadow: str, tmp_path: Path) -> None:
    other = tmp_path / shadow
    other.parent.mkdir(exist_ok=True)
    other.write_text("")
    done = mapdistill("--version", path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: `import engine` finds {other}, not mapdistill's package in {ROOT / 'engine'}; rename it, or take its "
        "folder out of PYTHONPATH\n"
    )


def test_ranked_scripts_end_as_ranks_do() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        assert ("run_rank" in path.read_text()) == (path.stem in RANKED), path


def test_a_password_in_a_setting_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = "postgresql+psycopg://me:secret@127.0.0.1:1/db"
    assert cli.main(["search", "--status", "--search.storage", storage, "--output_dir", str(tmp_path / "x")]) == 2
    shown = capsys.readouterr()
    assert "search.storage=postgresql+psycopg://me:***@127.0.0.1:1/db" in shown.out
    assert "secret" not in shown.out + shown.err
