"""The table of --status: what it says of a search while drivers work, and after they have ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from ga.optuna_private import id_of, set_trial_attr
from ga.study import drivers
from ga.study.drivers import Driver, Drivers
from ga.study.evaluations import GENOME, JOB, OWNER, REPEATED, Evaluation
from ga.study.storage import SearchStorage, open_storage
from ga.view.status import best_table, status_text

ME = Driver.this_process()
KILLED = dataclasses.replace(ME, started=ME.started - 1)
FAR = dataclasses.replace(ME, host="elsewhere", boot="other", pid=77)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[SearchStorage]:
    opened = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    yield opened
    opened.close()


def begin(storage: SearchStorage, name: str, owner: str, *, genome: str = "2-4") -> optuna.Study:
    """Returns a study with one trial of which a job of that driver has been told."""
    study = optuna.create_study(storage=storage.optuna, study_name=name, load_if_exists=True)
    trial = study.ask()
    set_trial_attr(study, id_of(trial), OWNER, owner)
    trial.set_user_attr(GENOME, genome)
    trial.set_user_attr(JOB, "here:trials/00000")
    return study


def rows(study: optuna.Study, **lists: optuna.Study) -> dict[str, str]:
    table = status_text(study, lists, "sqlite:///x", trials=12).partition("\n\n")[0]
    return {line[:12].strip(): line[12:] for line in table.splitlines()}


@pytest.mark.parametrize("driver", [ME, FAR], ids=["here", "elsewhere"])
def test_jobs_of_a_driver_at_work_are_running(storage: SearchStorage, driver: Driver) -> None:
    study = begin(storage, "search", driver.id)
    study.ask()  # of another seed than its job, so that it waits
    Drivers(study, driver, placements=1)
    found = rows(study)
    assert found["evaluations"] == "0 of 12 done"
    assert found["drivers"] == f"process {driver.pid} on {driver.host}"
    assert found["running"] == "here:trials/00000: 2-4"
    assert "open" not in found


@pytest.mark.parametrize("end", ["Ctrl-C", "kill -9", "a machine that is gone"])
def test_nothing_is_running_after_its_driver_has_ended(
    storage: SearchStorage, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = {"Ctrl-C": ME, "kill -9": KILLED}.get(end, FAR)
    study = begin(storage, "search", "" if end == "Ctrl-C" else driver.id)
    mine = Drivers(study, driver, placements=1)
    if end == "Ctrl-C":
        mine.leave()
    if driver is FAR:
        monkeypatch.setattr(drivers, "LEASE_S", 0.01)
        time.sleep(0.02)
    found = rows(study)
    assert found["running"] == "nothing"
    assert found["open"] == "1 genome begun by drivers that have ended; the same command continues"
    if driver is FAR:
        assert found["drivers"].startswith("process 77 on elsewhere: no sign of life for more than")
    else:
        assert found["drivers"] == "none (the same command without --status continues)"


def test_yardstick_and_confirmation_are_told_too(storage: SearchStorage) -> None:
    study = optuna.create_study(storage=storage.optuna, study_name="search")
    confirmation = begin(storage, "confirmation", ME.id, genome="1-4")
    confirmation.enqueue_trial({})
    Drivers(study, ME, placements=1)
    Drivers(confirmation, ME, placements=1)
    found = rows(study, confirmed=confirmation)
    assert found["confirmed"] == "0 of 2 done"
    assert found["drivers"] == f"process {ME.pid} on {ME.host}"
    assert found["running"] == "here:trials/00000: 1-4"


def test_the_best_table_has_each_genome_once_best_first() -> None:
    spent = [
        Evaluation(0, "0-0", "ok", fitness=0.25),
        Evaluation(1, "1-0", "ok", fitness=0.75),
        Evaluation(7, "1-0", REPEATED, fitness=0.75),
    ]
    rows = best_table(spent, 5).splitlines()
    assert [row.split()[:3] for row in rows[1:]] == [["1", "1-0", "0.7500"], ["2", "0-0", "0.2500"]]
    assert best_table([], 5) == "no genome has a fitness yet"
