"""What a fitness is measured by: shares of gaps, which tasks count, and what is said of a ranking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.records.yardstick import (
    NOT_A_RESULT,
    Noise,
    TaskScale,
    beaten_text,
    counting_tasks,
    describe_yardstick,
    equal_scales,
    fitness_of,
    is_none,
    noise_of,
    weighted_scales,
)

SCALES = {
    "SST-2": TaskScale(start=0.7, teacher=0.9, weight=3.0),
    "STS-B": TaskScale(start=0.4, teacher=0.8, weight=1.0),
    "MRPC": TaskScale(start=0.8, teacher=0.7, weight=0.0),
}


def test_a_fitness_is_the_weighted_share_of_the_gaps() -> None:
    start = {task: scale.start for task, scale in SCALES.items()}
    teacher = {task: scale.teacher for task, scale in SCALES.items()}
    assert fitness_of(start, SCALES) == pytest.approx(0.0)
    assert fitness_of(teacher, SCALES) == pytest.approx(1.0)
    assert fitness_of({"SST-2": 0.8, "STS-B": 0.4, "MRPC": 9.0, "RTE": 9.0}, SCALES) == pytest.approx(0.375)


def test_where_no_task_counts_it_is_the_mean_of_the_yardsticks_scores() -> None:
    idle = equal_scales({"a": 0.5, "b": 0.6}, {"a": 0.4, "b": 0.6}, ["a", "b"])
    assert counting_tasks(idle) == []
    assert fitness_of({"a": 0.2, "b": 0.4, "c": 9.0}, idle) == pytest.approx(0.3)
    assert "says little" in describe_yardstick(idle)


@given(st.floats(0.01, 10), st.floats(-5, 5))
def test_the_unit_of_a_task_does_not_matter(factor: float, offset: float) -> None:
    def moved(value: float) -> float:
        return factor * value + offset

    other = {**SCALES, "STS-B": TaskScale(start=moved(0.4), teacher=moved(0.8))}
    scores = {"SST-2": 0.85, "STS-B": 0.5, "MRPC": 0.1}
    assert fitness_of({**scores, "STS-B": moved(0.5)}, other) == pytest.approx(fitness_of(scores, SCALES), abs=1e-6)


def test_reliability_is_the_share_of_variance_that_mappings_make() -> None:
    """Of many mappings with two seeds each, deviations 0.03 between mappings and 0.01 between seeds: .9; of noise
    alone: about 0."""
    rng = np.random.default_rng(0)

    def table(spread: float) -> dict[str, dict[int, float]]:
        means = 0.7 + spread * rng.standard_normal(4000)
        return {str(i): {seed: mean + 0.01 * rng.standard_normal() for seed in (0, 1)} for i, mean in enumerate(means)}

    found = noise_of(table(0.03))
    assert found.deviation == pytest.approx(0.01, rel=0.03)
    assert found.reliability == pytest.approx(0.9, abs=0.01)
    assert noise_of(table(0.0)).reliability < 0.05


def test_a_task_counts_by_its_reliability_if_its_gap_is_wide() -> None:
    scales = {task: TaskScale(start=0.5, teacher=teacher) for task, teacher in {"a": 0.6, "b": 0.6, "c": 0.6}.items()}
    noise = {"a": Noise(0.01, 0.9), "b": Noise(0.04, 0.9), "c": Noise(0.02, 0.3)}
    assert {task: scale.weight for task, scale in weighted_scales(scales, noise).items()} == {
        "a": 0.9,
        "b": 0.0,
        "c": 0.3,
    }
    useless = {task: Noise(0.01, 0.0) for task in scales}
    assert {scale.weight for scale in weighted_scales(scales, useless).values()} == {1.0}
    below = {**scales, "a": TaskScale(start=0.5, teacher=0.4, weight=0.0)}
    assert weighted_scales(below, noise)["a"].weight == 0.0


def test_the_first_line_names_every_task_that_no_mapping_wins() -> None:
    scores = {
        "2-4-6": {"SST-2": 0.75, "STS-B": 0.5, "MRPC": 0.79},
        "1-2-3": {"SST-2": 0.72, "STS-B": 0.6, "MRPC": 0.75},
        "0-0-0": {"SST-2": 0.76, "STS-B": 0.3, "MRPC": 0.5},
    }
    assert beaten_text(scores, SCALES) == (
        "Not a result for SST-2: no mapping beats none (0.7600); the best, 2-4-6, has 0.7500; "
        "MRPC: no mapping beats the untrained student (0.8000); the best, 2-4-6, has 0.7900"
    )
    won = {**scores, "1-3-6": {"SST-2": 0.77, "STS-B": 0.7, "MRPC": 0.81}}
    assert not beaten_text(won, SCALES).startswith(NOT_A_RESULT)
    assert "the untrained student and none" in beaten_text(won, SCALES)
    assert beaten_text({"0-0-0": scores["0-0-0"]}, SCALES) == ""


@pytest.mark.parametrize(
    ("genome", "none"),
    [("0-0", True), ("0-0/0-0", True), ("0-1", False), ("0-0/0-10", False), ("1-2@0-0", True), ("0-0@0-1", False)],
)
def test_none_is_the_mapping_without_a_pair(genome: str, none: bool) -> None:
    assert is_none(genome) == none
