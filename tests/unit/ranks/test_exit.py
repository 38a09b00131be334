"""A rank's process ends with the code of its work, whatever C++ threads still want of Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from launching import ROOT

PAIR = """
import sys, time, torch, torch.distributed as dist
from engine.ranks.exit import run_rank

rank, store = int(sys.argv[1]), sys.argv[2]

kept = []  # a reference to the group, as DeepSpeed keeps one

def main():
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    kept.append(dist.group.WORLD)
    dist.barrier()
    sys.setswitchinterval(1000)  # nobody is given Python's lock before this thread waits for something
    if rank == 0:
        time.sleep(1)
    dist.all_reduce(torch.ones(4), async_op=True)  # rank 1's ends a second later, in a thread of Gloo
    dist.destroy_process_group()
    print("work is done", flush=True)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        pass
    return 0

run_rank(main)
"""


def run(program: str, *argv: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program, *argv]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.mark.faults
def test_a_thread_that_asks_late_for_pythons_lock(tmp_path: Path) -> None:
    """With `sys.exit(main())`, rank 1 ends with SIGABRT: "terminate called without an active exception"."""
    ranks = [run(PAIR, str(rank), str(tmp_path / "store")) for rank in (0, 1)]
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
    process = run(ENDS.format(body=body))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert output in text
    assert "at exit" in text


def test_the_output_has_no_room() -> None:
    with open("/dev/full", "w") as full:
        process = run(ENDS.format(body="return 3"), output=full)
        assert process.wait(timeout=120) == 3
