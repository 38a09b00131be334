"""What a search needs of Optuna beside its documented interface; nothing else here touches private names of it, and
tests/unit/ga/test_optuna_private.py fails when Optuna changes what is relied on.

- System attributes: what a search notes for itself must not stand among the values that optuna-dashboard shows.
- A trial by its id: Optuna lets only the process that has asked for a trial go on with it, and a search takes up the
  trials of drivers that are gone.
- A storage with the cache that `create_study` would put around it: the search opens one storage for many studies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna import Study
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

_GIVEN = "fixed_params"
"""Optuna's mark on a trial whose parameters were given by enqueue_trial."""


def share_storage(storage: RDBStorage) -> BaseStorage:
    """Returns what create_study and load_study make of a storage, to be shared by all studies in it."""
    return optuna.storages.get_storage(storage)


def study_attrs(study: Study) -> dict[str, Any]:
    """Returns the study's system attributes, as they are in the storage now."""
    return study._storage.get_study_system_attrs(study._study_id)


def set_study_attr(study: Study, key: str, value: Any) -> None:
    """Writes a system attribute."""
    study._storage.set_study_system_attr(study._study_id, key, value)


def trial_attrs(trial: FrozenTrial) -> dict[str, Any]:
    """Returns the trial's system attributes."""
    return trial.system_attrs


def set_trial_attr(study: Study, trial_id: int, key: str, value: Any) -> None:
    """Writes a system attribute."""
    study._storage.set_trial_system_attr(trial_id, key, value)


def given_params(trial: FrozenTrial) -> dict[str, Any] | None:
    """Returns the parameters that enqueue_trial has given a trial; None for one that the sampler was asked for."""
    return trial.system_attrs.get(_GIVEN)


def id_of(trial: FrozenTrial | optuna.Trial) -> int:
    """Returns the trial's id, which is unique in its storage; numbers are in their study."""
    return trial._trial_id


def trial_now(study: Study, trial_id: int) -> FrozenTrial:
    """Returns a trial as it is in the storage now."""
    return study._storage.get_trial(trial_id)


def resume_trial(study: Study, trial: FrozenTrial) -> optuna.Trial:
    """Returns a running trial that another process may have asked for, to be gone on with."""
    return optuna.Trial(study, trial._trial_id)


def note(study: Study, trial_id: int, notes: Mapping[str, Any]) -> None:
    """Writes user attributes, in this order."""
    for key, value in notes.items():
        study._storage.set_trial_user_attr(trial_id, key, value)


def report(study: Study, trial_id: int, values: Mapping[str, float]) -> None:
    """Writes intermediate values by step, which optuna-dashboard plots."""
    for step, value in values.items():
        study._storage.set_trial_intermediate_value(trial_id, int(step), value)
