"""The Optuna studies of a search: opened, and checked to be the same search as before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import TrialState

from engine.config.marks import Mark, settings
from engine.errors import UserError
from engine.jobs.proxy.facts import ProxyFacts
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.drivers import present_drivers
from ga.study.evaluations import Evaluation, rank_evaluations, read_history
from ga.study.proxy_identity import adopt_proxy
from ga.study.sources import SearchSource, confirmation_name
from ga.study.storage import SearchStorage
from ga.study.yardstick import yardstick_name

SETTINGS, COMPARABLE, PARTS, BUDGET = "settings", "comparable with", "fingerprint parts", "budget"
"""User attributes of a study: what must not change, what makes its fitness comparable with other studies', what the
proxy's fingerprint is made of, and search.trials of the driver that was started last."""


def search_space(config: SearchConfig, *, student_layers: int, teacher_layers: int) -> Space:
    """Returns the space that the configuration describes. Raises UserError for constraints that leave nothing."""
    return Space(
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        constraint=config.search.constraint,
        min_active=config.search.min_active,
        allowed=tuple(config.search.allowed_layers),
        separate_attention=config.search.separate_attention,
        kind=config.search.space,
    )


def binding_settings(config: SearchConfig, space: Space, facts: ProxyFacts) -> dict[str, Any]:
    """Returns what a continued search must have in common with its beginning; budget, slots, cohort and limits may
    change. The proxy's own settings are in its fingerprint."""
    found = settings(config, Mark.RESULT)
    return {
        "fingerprint": facts.fingerprint,  # first, as the most telling one of several differences
        **{key: value for key, value in found.items() if key.startswith("search.")},
        **{f"search.{name}": value for name, value in asdict(config.search.operators).items()},
        **settings(config, Mark.EVALUATION),
        "student layers": space.student_layers,
        "teacher layers": space.teacher_layers,
    }


def open_search(storage: SearchStorage, config: SearchConfig, space: Space, facts: ProxyFacts) -> SearchSource:
    """Creates the study or continues it. Raises UserError when it was begun with other settings."""
    wanted = binding_settings(config, space, facts)
    directions = [StudyDirection.MAXIMIZE]
    directions += [] if config.search.second_objective is None else [StudyDirection.MINIMIZE]
    with storage.lock():
        study = optuna.create_study(
            storage=storage.optuna, study_name=config.study, directions=directions, load_if_exists=True
        )
        begun = study.user_attrs.get(SETTINGS)
        if begun not in (None, wanted) and _is_untouched(study):
            optuna.delete_study(storage=storage.optuna, study_name=config.study)
            study = optuna.create_study(storage=storage.optuna, study_name=config.study, directions=directions)
            begun = None
        if begun is not None:
            _check_same(begun, wanted, study, facts, where=storage.shown_url)
        elif study.directions != directions or any(
            trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)
        ):
            raise UserError(
                f"study {config.study!r} in {storage.shown_url} was not begun by a search; name another search.study"
            )
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            study.set_metric_names(["fitness", "deepest teacher layer"][: len(directions)])  # for optuna-dashboard
        source = SearchSource(study, space, config.search, proxy_seed=config.seed)
        if begun is None:
            source.start()
            study.set_user_attr(PARTS, facts.fingerprint_parts)
            study.set_user_attr(COMPARABLE, comparable(config, facts))
            study.set_user_attr(SETTINGS, wanted)  # last: it says that the others are there
        study.set_user_attr(BUDGET, config.search.trials)
    return source


def _is_untouched(study: Study) -> bool:
    """Tells whether a search is as good as not begun: nothing has ended, no driver works on it. Its first job may have
    refused a setting, which is corrected now."""
    trials = study.get_trials(deepcopy=False)
    return not any(trial.state.is_finished() for trial in trials) and all(
        driver.is_silent for driver in present_drivers(study).values()
    )


def comparable(config: SearchConfig, facts: ProxyFacts) -> list[Any]:
    """Returns what two searches must have in common for their fitness to be comparable."""
    own = {task: asdict(scale) for task, scale in config.proxy.yardstick.items()}
    return [facts.fingerprint, config.seed, config.proxy.repeats, own]


def open_list(storage: SearchStorage, name: str) -> Study:
    """Creates or continues the study of a ListSource (ga/study/sources.py)."""
    with storage.lock():
        return optuna.create_study(storage=storage.optuna, study_name=name, direction="maximize", load_if_exists=True)


def load_search(storage: SearchStorage, config: SearchConfig) -> Study:
    """Opens the study of a search that was begun. Raises UserError."""
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=config.study)
    except KeyError:
        there = ", ".join(sorted(optuna.get_all_study_names(storage.optuna))) or "none"
        raise UserError(f"search.study={config.study!r} is not in {storage.shown_url}; there: {there}") from None
    if SETTINGS not in study.user_attrs:
        raise UserError(f"search.study={config.study!r} in {storage.shown_url} was not begun by a search")
    return study


def begun_lists(storage: SearchStorage, study: Study) -> dict[str, Study]:
    """Returns the studies of a search's yardstick and of its confirmation by what they are, as far as they were
    begun."""
    fingerprint, seed = study.user_attrs[COMPARABLE][:2]
    names = {
        "yardstick": yardstick_name(fingerprint, seed),
        "confirmed": confirmation_name(study.study_name, fingerprint),
    }
    there = optuna.get_all_study_names(storage.optuna)
    begun = {what: name for what, name in names.items() if name in there}
    return {what: optuna.load_study(storage=storage.optuna, study_name=name) for what, name in begun.items()}


def comparable_searches(storage: SearchStorage, study: Study) -> dict[str, list[Evaluation]]:
    """Returns the evaluations of the other searches of the storage whose fitness is comparable with this one's, by
    name. A search that has no proxy so far takes that of the first of them. Call it while the storage is locked."""
    names = (name for name in optuna.get_all_study_names(storage.optuna) if name != study.study_name)
    others = (optuna.load_study(storage=storage.optuna, study_name=name) for name in names)
    wanted = study.user_attrs[COMPARABLE]
    alike = [other for other in others if other.user_attrs.get(COMPARABLE) == wanted]
    return {other.study_name: read_history(other) for other in alike if adopt_proxy(study, other)}


def known_evaluations(storage: SearchStorage, study: Study) -> dict[str, Evaluation]:
    """Returns an evaluation with a fitness by genome, of comparable searches."""
    found: dict[str, Evaluation] = {}
    with storage.lock():
        others = comparable_searches(storage, study)
    for other in others.values():
        for one in rank_evaluations(other):
            found.setdefault(one.genome, one)
    return found


def _check_same(
    begun: Mapping[str, Any], wanted: Mapping[str, Any], study: Study, facts: ProxyFacts, *, where: str
) -> None:
    for key in dict.fromkeys([*wanted, *begun]):  # a table that is gone has no key of its own
        before, value = begun.get(key), wanted.get(key)
        if before == value:
            continue
        if key == "fingerprint":
            parts: Mapping[str, Any] = study.user_attrs.get(PARTS, {})
            differ = [name for name, part in facts.fingerprint_parts.items() if parts.get(name) != part]
            what = f"the proxy has changed since (fingerprint {before}, now {value}: {', '.join(differ)})"
        else:
            what = f"{key}={value!r}, but it was begun with {before!r}"
        raise UserError(
            f"search {study.study_name!r} in {where} cannot be continued: {what}; fitness values would not be "
            "comparable. Restore it, or start another search with another output_dir or search.study"
        )
