"""The yardstick of a search: which trials it is made of."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from engine.config.reading import parse_config
from engine.records.yardstick import counting_tasks
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.evaluations import BASELINES, GENOME, SCORES, SEED
from ga.study.yardstick import (
    Measured,
    given_yardstick,
    measure_yardstick,
    reusable_evaluations,
    yardstick_genomes,
    yardstick_seeds,
)

GAP = {"SST-2": {"start": 0.5, "teacher": 0.9}, "STS-B": {"start": 0.4, "teacher": 0.8}}


def study_of(scores: dict[tuple[str, int], dict[str, float]]) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for (genome, seed), values in scores.items():
        attrs = {GENOME: genome, SEED: seed, SCORES: values, BASELINES: GAP, "outcome": "ok", "seconds": 3.0}
        study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs=attrs))
    return study


def scores(noise: float = 0.01) -> dict[tuple[str, int], dict[str, float]]:
    means = {"2-4": 0.8, "3-4": 0.75, "1-2": 0.6, "0-0": 0.55}
    return {
        (genome, seed): {"SST-2": mean + noise * (seed - 0.5), "STS-B": 0.6 + 0.3 * (seed - 0.5)}
        for genome, mean in means.items()
        for seed in (0, 1)
    }


def test_a_noisy_task_does_not_count_and_none_is_kept() -> None:
    found = measure_yardstick(study_of(scores()), range(2))
    assert found is not None
    assert counting_tasks(found.scales) == ["SST-2"]
    assert found.scales["SST-2"].weight == pytest.approx(found.noise["SST-2"].reliability)
    assert found.noise["STS-B"].deviation == pytest.approx(0.3 * 2**-0.5)
    assert found.none == {"SST-2": pytest.approx(0.55), "STS-B": pytest.approx(0.6)}
    assert found.seconds == 24.0
    assert Measured.of(found.kept()) == found


def test_seeds_that_another_search_has_added_change_nothing() -> None:
    """One with more repeats."""
    more = {(genome, 2): {"SST-2": 0.1, "STS-B": 0.1} for genome in ("2-4", "3-4", "1-2", "0-0")}
    assert measure_yardstick(study_of(scores() | more), range(2)) == measure_yardstick(study_of(scores()), range(2))


def test_with_a_single_mapping_all_tasks_weigh_alike() -> None:
    found = measure_yardstick(study_of({("2-4", 0): {"SST-2": 0.7, "STS-B": 0.7}}), range(2))
    assert found is not None
    assert (found.noise, found.none) == ({}, {})
    assert [scale.weight for scale in found.scales.values()] == [1.0, 1.0]
    assert measure_yardstick(study_of({}), range(2)) is None


def test_what_was_evaluated_with_the_searchs_seeds_is_known() -> None:
    study = study_of(scores())
    found = measure_yardstick(study, range(2))
    assert found is not None
    known = reusable_evaluations(study, found, [0])
    assert known["2-4"].by_seed == {0: known["2-4"].fitness}
    assert known["2-4"].fitness == pytest.approx((0.795 - 0.5) / 0.4)
    assert reusable_evaluations(study, found, [0, 1, 2]) == {}, "a seed is missing"


def test_genomes_and_seeds(tmp_path: Path) -> None:
    assert yardstick_genomes(Space(student_layers=3, teacher_layers=6)) == ["2-4-6", "4-5-6", "1-2-3", "6-6-6", "0-0-0"]
    assert yardstick_genomes(Space(student_layers=4, teacher_layers=2)) == ["1-1-2-2", "2-2-2-2", "0-0-0-0"]
    out = ["--output_dir", str(tmp_path)]
    assert list(yardstick_seeds(parse_config(SearchConfig, [*out, "--seed", "5"], "test"))) == [5, 6]
    assert list(yardstick_seeds(parse_config(SearchConfig, [*out, "--proxy.repeats", "3"], "test"))) == [0, 1, 2]
    own = parse_config(SearchConfig, [*out, "--proxy.yardstick", "{SST-2: {start: 0.5, teacher: 0.9}}"], "test")
    assert given_yardstick(own) is not None
    assert given_yardstick(parse_config(SearchConfig, out, "test")) is None
