"""SIGKILL at random moments: to the driver, to a job, and with real jobs to a launcher or a rank. What must hold: every
genome gets its result exactly once, and no process is left.

MAPDISTILL_KILLS says how many (3 unless it is set; 4 where jobs are stand-ins); MAPDISTILL_KILL_SEED which moments.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import optuna
import psutil
import pytest
from searching import SearchRun, finish, wait_until

from ga.study.ledger import LOSSES
from ga.study.storage import open_storage

SEED = int(os.environ.get("MAPDISTILL_KILL_SEED", "0"))
SPACE = 25

MakeSearch = Callable[..., SearchRun]
pytestmark = pytest.mark.faults


@dataclass
class Situation:
    make: MakeSearch
    kills: int
    longest_s: float
    """Between two kills."""
    of_a_job: tuple[str, ...]
    """Kinds of its processes."""


@pytest.fixture(params=["stand-in", pytest.param("real", marks=[pytest.mark.thorough, pytest.mark.launcher])])
def situation(request: pytest.FixtureRequest, make_search: MakeSearch, make_stand_in_search: MakeSearch) -> Situation:
    kills = int(os.environ.get("MAPDISTILL_KILLS", "0"))
    if request.param == "real":
        return Situation(make_search, kills or 3, 15.0, ("launcher", "rank"))
    make = functools.partial(make_stand_in_search, told={"seconds": 0.2})
    return Situation(make, kills or 4, 2.5, ("job",))


def test_nothing_is_lost_or_run_twice_or_left_behind(situation: Situation) -> None:
    search = situation.make("killed", sampler="exhaustive", trials=SPACE, cohort=3, confirm_top=0)
    rng = random.Random(SEED)
    killed: Counter[str] = Counter()
    driver = search.start()
    while killed.total() < situation.kills and driver.poll() is None:
        time.sleep(rng.uniform(0.3, situation.longest_s))
        # launchers and ranks seldom: a trial that is lost twice while its driver lives has failed for good
        others = killed.total() - killed["driver"]
        kind = "driver" if killed["driver"] <= 3 * others else rng.choice(situation.of_a_job)
        victim = driver.pid if kind == "driver" else process_of(search, kind)
        if victim is None or driver.poll() is not None:
            continue
        os.kill(victim, signal.SIGKILL)
        killed[kind] += 1
        if kind == "driver":
            driver.communicate()
            driver = search.start()
    output = finish(driver)
    assert killed["driver"], "the search was over before the first kill"
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
    assert len({one.genome for one in found}) == len(found) == SPACE
    assert set(results.values()) == {1}, "a finished genome was run again"
    assert all(losses_of(search, one.number)["job"] == 2 for one in failed.values()), output
    assert set(results) == {one.genome for one in found} - set(failed)


def process_of(search: SearchRun, kind: str) -> int | None:
    """A launcher or a rank of a running job, or any of its processes (`job`), if there is one."""
    for pid in search.job_processes():
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.Error:
            continue
        is_rank = any(word.startswith("--local_rank") for word in words)
        is_launcher = any(word.endswith("deepspeed.launcher.launch") for word in words)
        if kind == "job" or (is_rank and kind == "rank") or (is_launcher and kind == "launcher"):
            return pid
    return None


def losses_of(search: SearchRun, number: int) -> dict[str, int]:
    storage = open_storage(f"sqlite:///{search.output_dir / 'study.db'}")
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=search.output_dir.name)
        return dict(study.trials[number].system_attrs[LOSSES])
    finally:
        storage.close()


def test_a_driver_killed_alone_leaves_its_job_to_the_next(situation: Situation) -> None:
    """The job ends by itself, what it has recorded counts, and is not run again."""
    search = situation.make("orphaned", sampler="random", trials=4, cohort=4, confirm_top=0)
    search.told = {"seconds": 0.5}  # of stand-ins
    driver = search.start()
    trials = search.output_dir / "trials"
    wait_until(lambda: trials.exists() and process_of(search, situation.of_a_job[-1]) is not None, driver)
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
