"""Decisions of the driver's loop that need no job; whole searches are in tests/distributed."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from small_disk import SmallDisk
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from engine.errors import UserError
from engine.records.run_dir import as_yaml
from ga.config import SearchConfig, SearchSection
from ga.evolution.genome import Space
from ga.jobs.launcher import COMMAND
from ga.jobs.outcome import JobReport, Outcome
from ga.jobs.pool import JobPool, find_placements
from ga.loop import GivenUp, Interrupted, Loop, give_up_after_failures
from ga.study.drivers import Driver, Drivers
from ga.study.ledger import FOLDER, OWNER, Claim, Ledger
from ga.study.sources import SearchSource
from ga.study.storage import open_storage
from ga.view.live import LiveView


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def loop(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Loop:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    config = SearchConfig(output_dir=str(tmp_path), search=SearchSection(cohort=8, sampler="random"))
    study = optuna.create_study(storage=storage.optuna, direction="maximize")
    source = SearchSource(study, Space(student_layers=3, teacher_layers=6), config.search, proxy_seed=0)
    drivers = Drivers(study, Driver.this_process(), placements=1)
    placements = find_placements(hostfile=None, local_slots=None, slots_per_job=1, launcher="pdsh")
    return Loop(
        config=config,
        ledger=Ledger(storage, source, drivers, yardstick={}),
        pool=JobPool(placements, launcher="pdsh", hostfile=None, limit_s=60),
        drivers=drivers,
        stop=lambda: False,
        say=said.append,
        proxy=lambda: config.proxy,
        changed=lambda: None,
        folders=tmp_path / "trials",
    )


def report(outcomes: dict[str, Outcome]) -> JobReport:
    return JobReport(outcomes, {}, {}, "what happened")


def test_a_cohort_that_does_not_fit_into_memory_is_halved(loop: Loop, said: list[str]) -> None:
    claims = [Claim(i, i, f"{i}-0-0", 0) for i in range(7)]
    outcomes = {claim.genome: Outcome.OUT_OF_MEMORY for claim in claims} | {"0-0-0": Outcome.OK}
    assert loop._too_many_for_memory(claims, report(outcomes)) == claims[1:]
    assert loop.cohort == 3
    assert "7 students" in said[0]
    alone = claims[1:2]
    assert loop._too_many_for_memory(alone, report(outcomes)) == [], "it does not fit even alone"
    assert loop.cohort == 3
    assert loop._too_many_for_memory(claims, report(dict.fromkeys(outcomes, Outcome.LOST))) == []


def test_jobs_that_are_lost_before_the_first_one_begins_are_no_fault_of_genomes(loop: Loop) -> None:
    lost = report({"1-0-0": Outcome.LOST})
    assert [loop._cannot_start(lost) for _ in range(2)] == [False, True]
    loop._lost_at_start = 0
    claims = loop.ledger.claim(1)
    begun = JobReport({claims[0].genome: Outcome.DIVERGED}, {}, {}, "", "f")
    assert not loop._cannot_start(begun)
    loop.ledger.finish(claims, begun, seconds=1.0, cohort=1)
    assert not any(loop._cannot_start(lost) for _ in range(3))


def test_a_second_start_of_a_trial_gets_a_folder_of_its_own(loop: Loop) -> None:
    names = []
    for _ in range(3):
        folder = loop._new_folder(12)
        folder.mkdir(parents=True)
        names.append(folder.name)
    assert names == ["00012", "00012-2", "00012-3"]


@pytest.mark.faults
def test_a_job_without_room_on_the_disk_leaves_its_trials_open(
    loop: Loop, small_disk: Callable[[int], SmallDisk]
) -> None:
    """There is room for its configuration, and none for its command."""
    disk = small_disk(1)
    loop.folders = disk.folder / "trials"
    filler = disk.folder / "filler"
    disk.fill()
    claims = loop.ledger.claim(2)
    job = loop.config.job(output_dir=str(loop.folders / "00000"), genomes=[claim.genome for claim in claims])
    pages = -(-len(as_yaml(job)) // 4096)
    os.truncate(filler, filler.stat().st_size - 4096 * pages)
    with pytest.raises(OSError, match="No space left on device"):
        loop._start_job(loop.pool.placements[0], claims)
    folder = loop.folders / "00000"
    assert (folder / "config.yaml").stat().st_size > 0
    assert (folder / COMMAND).read_text() == ""
    for trial in loop.ledger._trials():
        assert (trial.system_attrs[OWNER], trial.system_attrs[FOLDER]) == ("", "")
    disk.free()
    assert loop.ledger.claim(2) == claims


@pytest.mark.faults
def test_a_storage_that_does_not_answer_for_a_while_is_waited_for(
    loop: Loop, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install 'psycopg[binary]'")
    monkeypatch.setattr("ga.loop.ASK_AGAIN_S", 0.01)
    attempts = 0

    def answer() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none").connect()  # nothing listens there
        return "here"

    assert loop.ask_patiently(answer) == "here"
    assert attempts == 4
    assert len(said) == 1
    assert "does not answer" in said[0]

    attempts = -1000
    monkeypatch.setattr("ga.loop.OUTAGE_S", 0.05)
    with pytest.raises(UserError, match=r"search\.storage has not answered"):
        loop.ask_patiently(answer)


@pytest.mark.faults
def test_other_errors_of_the_storage_are_not_waited_for(loop: Loop) -> None:
    with pytest.raises(OperationalError):
        loop.ask_patiently(lambda: create_engine("sqlite:////no/such/folder/x.db").connect())


@pytest.mark.faults
def test_a_driver_that_is_told_to_stop_does_not_wait_for_the_storage(loop: Loop) -> None:
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install 'psycopg[binary]'")
    loop.stop = lambda: True
    with pytest.raises(Interrupted):
        loop.ask_patiently(lambda: create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none").connect())


def test_a_search_that_gave_up_may_try_again(tmp_path: Path) -> None:
    config = SearchConfig(output_dir=str(tmp_path), search=SearchSection(max_failures=2))
    study = optuna.create_study(direction="maximize")
    space = Space(student_layers=2, teacher_layers=4)

    def fail() -> None:
        trial = study.ask()
        trial.set_user_attr("genome", "1-2")
        trial.set_user_attr("outcome", "diverged")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)

    for _ in range(2):  # the second driver does not look at the first one's failures
        began = datetime.datetime.now()
        with LiveView(config, space, study, tasks=["SST-2"]) as view, view.search_stage():

            def look(view: LiveView = view, began: datetime.datetime = began) -> None:
                give_up_after_failures(view.update(), since=began, most=config.search.max_failures)

            look()
            fail()
            look()
            fail()
            with pytest.raises(GivenUp, match="the last 2 genomes got no fitness"):
                look()
