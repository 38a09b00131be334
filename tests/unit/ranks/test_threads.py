"""Threads on a machine that others use: what OpenMP is told, and that busy cores are seen."""

from __future__ import annotations

import os
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


def test_a_busy_process_is_seen_and_a_sibling_rank_is_not() -> None:
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        assert cores_of_others(1) > 0.3
    finally:
        loop.kill()
        loop.wait()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_ranks_of_one_launcher_do_not_count_each_other() -> None:
    code = "from engine.ranks.threads import cores_of_others; print(cores_of_others(2))"
    spin = "import time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    launcher = (
        "import subprocess, sys\n"
        f"sibling = subprocess.Popen([sys.executable, '-c', {spin!r}])\n"
        f"alone = subprocess.run([sys.executable, '-c', {code.replace('(2)', '(1)')!r}], stdout=subprocess.PIPE)\n"
        f"rank = subprocess.run([sys.executable, '-c', {code!r}], stdout=subprocess.PIPE)\n"
        "sibling.kill(); print(float(alone.stdout) - float(rank.stdout))"
    )
    done = subprocess.run([sys.executable, "-c", launcher], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert float(done.stdout) > 0.3, done.stderr
