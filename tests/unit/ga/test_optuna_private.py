"""What the search relies on in Optuna beside its documented interface: a new version that changes it fails here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna import Study
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from ga.optuna_private import (
    given_params,
    id_of,
    note,
    report,
    resume_trial,
    set_study_attr,
    set_trial_attr,
    share_storage,
    study_attrs,
    trial_attrs,
    trial_now,
)


@pytest.fixture(params=["memory", "sqlite"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Study]:
    rdb = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    storage = None if request.param == "memory" else share_storage(rdb)
    yield optuna.create_study(storage=storage, study_name="one", direction="maximize")
    rdb.engine.dispose()


def test_a_shared_storage_is_taken_as_it_is(tmp_path: Path) -> None:
    storage = share_storage(RDBStorage(f"sqlite:///{tmp_path / 'study.db'}"))
    studies = [optuna.create_study(storage=storage, study_name=name) for name in ("one", "two")]
    assert all(study._storage is storage for study in studies)
    assert isinstance(storage, optuna.storages.BaseStorage)


def test_notes_of_a_study_are_seen_at_once_and_not_by_users(study: Study) -> None:
    set_study_attr(study, "mapdistill:one", {"beat": 1})
    set_study_attr(study, "mapdistill:one", {"beat": 2})
    assert study_attrs(study)["mapdistill:one"] == {"beat": 2}
    assert study.user_attrs == {}


def test_a_running_trial_is_noted_taken_up_and_told_by_another(study: Study) -> None:
    study.enqueue_trial({"x": 3})
    asked = study.ask()
    assert asked.suggest_int("x", 0, 9) == 3
    set_trial_attr(study, id_of(asked), "mapdistill:owner", "me")
    note(study, id_of(asked), {"genome": "1-2", "seed": 0})
    report(study, id_of(asked), {"5": 0.25})
    (found,) = study.get_trials(deepcopy=False)
    assert id_of(found) == id_of(asked)
    assert (trial_attrs(found)["mapdistill:owner"], found.user_attrs) == ("me", {"genome": "1-2", "seed": 0})
    assert (found.intermediate_values, found.state) == ({5: 0.25}, TrialState.RUNNING)
    again = resume_trial(study, found)
    assert (again.number, again.suggest_int("x", 0, 9)) == (asked.number, 3)
    study.tell(found.number, 0.5)
    now = trial_now(study, id_of(found))
    assert (now.state, now.value) == (TrialState.COMPLETE, 0.5)
    assert trial_attrs(now)["mapdistill:owner"] == "me"


def test_a_trial_that_was_asked_for_in_vain_keeps_what_its_sampler_says(study: Study) -> None:
    """A driver died between asking for it and describing it."""
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    value = study.ask().suggest_int("x", 0, 1000)
    (found,) = study.get_trials(deepcopy=False)
    assert resume_trial(study, found).suggest_int("x", 0, 1000) == value


def test_given_parameters_are_told_from_sampled_ones(study: Study) -> None:
    study.enqueue_trial({"x": 3, "seed": 100_000})
    study.ask()
    study.ask()
    assert [given_params(trial) for trial in study.get_trials(deepcopy=False)] == [{"x": 3, "seed": 100_000}, None]
