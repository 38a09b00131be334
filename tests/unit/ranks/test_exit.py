"""A rank's process ends with the code of its work, whatever C++ threads still want of Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from launching import ROOT


def run(*argv: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *argv]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.mark.faults
def test_a_thread_that_asks_late_for_pythons_lock(tmp_path: Path) -> None:
    """With `sys.exit(main())`, rank 1 ends with SIGABRT: "terminate called without an active exception"
    (tests/distributed/test_upstream.py)."""
    program = str(ROOT / "tests" / "support" / "late_gloo.py")
    ranks = [run(program, str(rank), str(tmp_path / "store")) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert ranks[1].returncode == 0, outputs[1]
    assert outputs[1].splitlines()[-1] == "work is done"


ENDS = """
import atexit, sys
from engine.ranks.exit import run_rank

atexit.register(print, "at exit")
sys.stdout.write("not yet flushed ")

def main():
    {body}

run_rank(main)
"""


@pytest.mark.parametrize(
    ("body", "code", "output"),
    [
        ("return 4", 4, "not yet flushed at exit\n"),
        ("sys.exit(0)", 0, "not yet flushed at exit\n"),
        ("raise OSError('no such luck')", 1, "OSError: no such luck\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
    ],
)
def test_codes_and_what_is_said(body: str, code: int, output: str) -> None:
    process = run("-c", ENDS.format(body=body))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert output in text
    assert "at exit" in text


def test_the_output_has_no_room() -> None:
    with open("/dev/full", "w") as full:
        process = run("-c", ENDS.format(body="return 3"), output=full)
        assert process.wait(timeout=120) == 3
