"""A search whose database or disk fails. What must hold: one line, nothing lost, and the same command continues."""

from __future__ import annotations

import fcntl
import os
import select
import sqlite3
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import hear_signals
from launching import ROOT, environment
from searching import SearchRun, finish, wait_until
from small_disk import SmallDisk

from engine.errors import EXIT_PREEMPTED
from ga.study.storage import open_storage

MakeSearch = Callable[..., SearchRun]
pytestmark = pytest.mark.faults


def error_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


def take_terminal() -> None:
    """In a child, before its program: standard input becomes the terminal that it belongs to."""
    hear_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_full_disk_of_the_driver_and_of_the_database(
    make_stand_in_search: MakeSearch, small_disk: Callable[[int], SmallDisk]
) -> None:
    runs, database = small_disk(4), small_disk(2)
    settings = {"sampler": "random", "trials": 4, "cohort": 2, "confirm_top": 0, "told": {"seconds": 1}}
    search = make_stand_in_search("full", storage=f"sqlite:///{database.folder}/study.db", **settings)
    search.output_dir = runs.folder / "search"
    runs.fill()
    assert "cannot be written: [Errno 28] No space left on device" in error_of(search.finish(expect=2))
    runs.free()

    driver = search.start()
    wait_until(lambda: bool(list(search.output_dir.glob("trials/*/output.log"))), driver)
    database.fill()
    said = error_of(finish(driver, expect=2))
    assert f"search.storage=sqlite:///{database.folder}/study.db: " in said
    assert "disk is full; fix that, and the same command continues" in said
    database.free()

    search.finish()
    found = search.evaluations()
    assert len({one.genome for one in found}) == len(found) == 4
    assert {one.outcome for one in found} == {"ok"}
    assert set(search.results().values()) == {1}, "a genome was run twice"
    assert not search.job_processes()


@pytest.mark.launcher
@pytest.mark.thorough  # tests/unit/ga/test_loop_stop.py has the driver alone
def test_a_terminal_that_goes_ends_the_search_in_order(make_search: MakeSearch) -> None:
    """As when an ssh session is lost: the kernel sends SIGHUP, and whatever is written from then on is EIO."""
    search = make_search("hung up", sampler="random", trials=4, cohort=2, confirm_top=0)
    ours, theirs = os.openpty()
    driver = subprocess.Popen(
        search.command(),
        cwd=ROOT,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    trials = search.output_dir / "trials"
    while not (trials.exists() and list(trials.glob("*/output.log"))):
        assert driver.poll() is None
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 1 << 16)  # or the driver would wait for its terminal
    os.close(ours)
    try:
        assert driver.wait(120) == EXIT_PREEMPTED
        assert not search.job_processes()
    finally:
        driver.kill()


def test_a_database_that_is_none_or_of_another_optuna(make_stand_in_search: MakeSearch, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    search = make_stand_in_search("refused", storage=f"sqlite:///{path}")
    path.write_text("trials: 64\n" * 100)
    said = error_of(search.finish("--status", expect=2))
    assert "study.db: file is not a database; name another file" in said
    path.unlink()
    open_storage(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    connection.close()
    said = error_of(search.finish("--status", expect=2))
    assert "its tables are not those of this Optuna version: " in said
    assert said.endswith("; or name another database")
