"""SIGKILL at random moments: to the driver, to the launcher of a job, to one of its ranks. What must hold: every
genome gets its result exactly once, and no process is left.

MAPDISTILL_KILLS says how many (3 unless it is set); MAPDISTILL_KILL_SEED which moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import optuna
import psutil
import pytest
from searching import SearchRun, finish

from ga.study.ledger import LOSSES
from ga.study.storage import open_storage

KILLS = int(os.environ.get("MAPDISTILL_KILLS", "3"))
SEED = int(os.environ.get("MAPDISTILL_KILL_SEED", "0"))
SPACE = 25


@pytest.mark.faults
def test_nothing_is_lost_or_run_twice_or_left_behind(make_search: Callable[..., SearchRun]) -> None:
    search = make_search("killed", sampler="exhaustive", trials=SPACE, cohort=3, confirm_top=0)
    rng = random.Random(SEED)
    killed: Counter[str] = Counter()
    driver = search.start()
    while killed.total() < KILLS and driver.poll() is None:
        time.sleep(rng.uniform(0.5, 15.0))
        # launchers and ranks seldom: a trial that is lost twice while its driver lives has failed for good
        kind = (
            "driver"
            if killed["driver"] <= 3 * (killed["launcher"] + killed["rank"])
            else rng.choice(["launcher", "rank"])
        )
        victim = driver.pid if kind == "driver" else process_of(search, kind)
        if victim is None or driver.poll() is not None:
            continue
        os.kill(victim, signal.SIGKILL)
        killed[kind] += 1
        if kind == "driver":
            driver.communicate()
            driver = search.start()
    output = finish(driver)
    found = search.evaluations()
    results = search.results()
    left = search.job_processes()
    failed = {one.genome: one for one in found if one.outcome != "ok"}
    print(
        f"\n{killed.total()} kills ({dict(killed)}): {len(found)} trials, {len(found) - len(failed)} ok, "
        f"{len(failed)} failed, {results.total()} results of {len(results)} genomes in {len(search.folders())} jobs, "
        f"{len(left)} processes left"
    )
    assert not left
    assert not (search.output_dir / "checks").exists()
    assert len({one.genome for one in found}) == len(found) == SPACE
    assert set(results.values()) == {1}, "a finished genome was run again"
    assert all(losses_of(search, one.number)["job"] == 2 for one in failed.values()), output
    assert set(results) == {one.genome for one in found} - set(failed)


def process_of(search: SearchRun, kind: str) -> int | None:
    """A launcher or a rank of a running job, if there is one."""
    for pid in search.job_processes():
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.Error:
            continue
        is_rank = any(word.startswith("--local_rank") for word in words)
        is_launcher = any(word.endswith("deepspeed.launcher.launch") for word in words)
        if (is_rank and kind == "rank") or (is_launcher and kind == "launcher"):
            return pid
    return None


def losses_of(search: SearchRun, number: int) -> dict[str, int]:
    storage = open_storage(f"sqlite:///{search.output_dir / 'study.db'}")
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=search.output_dir.name)
        return dict(study.trials[number].system_attrs[LOSSES])
    finally:
        storage.close()


@pytest.mark.faults
def test_a_driver_killed_alone_leaves_its_job_to_the_next(make_search: Callable[..., SearchRun]) -> None:
    """The job ends by itself, what it has recorded counts, and is not run again."""
    search = make_search("orphaned", sampler="random", trials=4, cohort=4, confirm_top=0)
    driver = search.start()
    wait_for_rank(search, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert search.job_processes(), "the job was to go on"
    deadline = time.monotonic() + 120
    while search.job_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    search.finish()
    assert len(search.folders()) == 1
    assert {one.outcome for one in search.evaluations()} == {"ok"}


def wait_for_rank(search: SearchRun, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (search.output_dir / "trials").exists() or process_of(search, "rank") is None:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
