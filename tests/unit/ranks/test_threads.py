"""Threads on a machine that others use: what OpenMP is told, and that busy cores are seen."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from launching import ROOT, environment

from engine.ranks.allocator import MOST_COMPILED
from engine.ranks.threads import SPIN_COUNT, cores_of_others, wait_briefly


def test_what_the_user_has_set_stays() -> None:
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        environ = dict(given)
        wait_briefly(environ)
        assert environ == given
    environ = {}
    wait_briefly(environ)
    assert environ == {"GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOMP_SPINCOUNT", SPIN_COUNT),
        ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", MOST_COMPILED),
        ("LRU_CACHE_CAPACITY", MOST_COMPILED),
    ],
)
def test_libraries_are_told_before_torch_is_loaded(name: str, value: str) -> None:
    code = (
        "import os, sys; from engine.cli import run_main\n"
        f"run_main(lambda: print('torch' in sys.modules, os.environ['{name}']) or 0)"
    )
    for given in ({}, {name: "3"}):
        env = environment() | given
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stdout.split() == ["False", given.get(name, value)], done.stderr


def test_a_busy_process_is_seen() -> None:
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        assert cores_of_others(1) > 0.3
    finally:
        loop.kill()
        loop.wait()


def test_ranks_of_one_launcher_do_not_count_each_other() -> None:
    """A launcher with two children: one sleeps, the other looks for it as its only job, and as one of two ranks."""
    look = "import sys; from engine.ranks.threads import seconds_of_others as others\n"
    look += "print(int(sys.argv[1]) in others(1), int(sys.argv[1]) in others(2))"
    launcher = (
        "import subprocess, sys\n"
        "sibling = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        f"subprocess.run([sys.executable, '-c', {look!r}, str(sibling.pid)])\n"
        "sibling.kill()"
    )
    done = subprocess.run([sys.executable, "-c", launcher], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
