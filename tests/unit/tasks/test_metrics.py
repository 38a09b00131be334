"""Metrics against scikit-learn and scipy, on hand-worked cases, and where they are undefined."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from engine.tasks.metrics import compute, glue_average, score_task, task_score
from engine.tasks.specs import BUILT_IN

NEAR = 1e-12
CLASS_PAIRS = st.integers(2, 5).flatmap(
    lambda labels: st.lists(st.tuples(st.integers(0, labels - 1), st.integers(0, labels - 1)), min_size=1, max_size=60)
)
GRID = st.integers(-8, 8).map(lambda n: n / 4)  # few values: many ties
NUMBER_PAIRS = st.lists(st.tuples(GRID, GRID), min_size=2, max_size=60)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@settings(max_examples=300, deadline=None)
@given(CLASS_PAIRS)
def test_class_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, targets = np.array(pairs, np.int64).T
    binary = max(predictions.max(), targets.max()) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined cases, which are 0.0 there and here
        f1 = f1_score(targets, predictions, average="binary" if binary else "macro", zero_division=0.0)
        matthews = matthews_corrcoef(targets, predictions)
    assert compute("accuracy", predictions, targets) == accuracy_score(targets, predictions)
    assert compute("f1", predictions, targets) == pytest.approx(f1, abs=NEAR)
    assert compute("matthews", predictions, targets) == pytest.approx(matthews, abs=NEAR)


@settings(max_examples=300, deadline=None)
@given(NUMBER_PAIRS)
def test_correlations_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    predictions, targets = np.array(pairs, np.float64).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = {"pearson": pearsonr(predictions, targets)[0], "spearman": spearmanr(predictions, targets)[0]}
    for name, value in want.items():
        got = compute(name, predictions, targets)
        assert got == pytest.approx(0.0 if math.isnan(value) else value, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_correlations_of_many_float32_predictions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = np.round(rng.uniform(0, 5, 1500), 1).astype(np.float32)  # as STS-B: ties
    predictions = (targets + rng.normal(0, 1, 1500)).astype(np.float32)
    wide = predictions.astype(np.float64), targets.astype(np.float64)
    assert compute("pearson", predictions, targets) == pytest.approx(pearsonr(*wide)[0], abs=NEAR)
    assert compute("spearman", predictions, targets) == pytest.approx(spearmanr(*wide)[0], abs=NEAR)


def test_ranks_of_many_equal_values() -> None:
    """Sums of 70,000 ranks do not fit into 32 bits."""
    targets = np.repeat(floats(0.0, 1.0), 70_000)
    predictions = np.concatenate([floats(2.0), targets[1:]])
    assert compute("spearman", predictions, targets) == pytest.approx(spearmanr(predictions, targets)[0], abs=NEAR)


def test_metrics_worked_by_hand() -> None:
    predictions, targets = ints(1, 1, 1, 0, 0), ints(1, 1, 0, 1, 0)  # 2 tp, 1 fp, 1 fn, 1 tn
    assert compute("accuracy", predictions, targets) == 3 / 5
    assert compute("f1", predictions, targets) == pytest.approx(4 / 6, abs=NEAR)
    assert compute("matthews", predictions, targets) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert compute("pearson", floats(1, 2, 3), floats(1, 2, 6)) == pytest.approx(5 / math.sqrt(2 * 14), abs=NEAR)
    assert compute("spearman", floats(1, 2, 2, 9), floats(1, 3, 2, 4)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize(
    ("name", "predictions", "targets"),
    [
        ("matthews", ints(1, 1, 1), ints(1, 1, 1)),  # torchmetrics says 1.0
        ("matthews", ints(0, 0, 0), ints(1, 1, 1)),
        ("matthews", ints(1, 1, 1), ints(1, 0, 1)),
        ("matthews", ints(1, 0, 1), ints(0, 0, 0)),
        ("f1", ints(0, 0), ints(0, 0)),
        ("f1", ints(0, 0), ints(1, 1)),
        ("pearson", floats(0.1, 0.1, 0.1), floats(1, 2, 3)),
        ("pearson", floats(1, 2, 3), floats(0.1, 0.1, 0.1)),
        ("spearman", floats(0.1, 0.1, 0.1), floats(1, 2, 3)),
        ("pearson", floats(1.0), floats(2.0)),
        ("spearman", floats(1.0), floats(2.0)),
    ],
)
def test_undefined_metrics_are_zero(name: str, predictions: np.ndarray, targets: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(name, predictions, targets) == 0.0


def test_a_constant_that_rounding_blurs_has_no_correlation() -> None:
    """The float64 mean of 1,000 times float32 0.1 may differ from it, which would leave noise to correlate."""
    targets = np.arange(1000, dtype=np.float32)
    assert compute("pearson", np.full(1000, 0.1), targets) == 0.0


def test_tiny_differences_count() -> None:
    targets = floats(1, 2, 3, 4)
    assert compute("pearson", 1 + 1e-9 * targets.astype(np.float64), targets) == pytest.approx(1.0, abs=1e-6)


def test_f1_of_more_labels_counts_the_labels_that_occur() -> None:
    predictions, targets = ints(0, 1, 1), ints(0, 1, 0)
    assert compute("f1", predictions, targets) == pytest.approx(2 / 3, abs=NEAR)  # of label 1
    assert compute("f1", predictions, targets, labels=4) == pytest.approx((2 / 3 + 2 / 3) / 2, abs=NEAR)
    assert compute("f1", ints(0, 2, 2), ints(0, 2, 1), labels=4) == pytest.approx((1 + 2 / 3 + 0) / 3, abs=NEAR)


def test_matthews_does_not_overflow() -> None:
    """n^4 of QQP's 364,000 rows is far beyond 64 bits."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 400_000)
    predictions = np.where(rng.random(400_000) < 0.2, 1 - targets, targets)
    got = compute("matthews", predictions, targets)
    assert got == pytest.approx(matthews_corrcoef(targets, predictions), abs=1e-9)
    assert 0.59 < got < 0.61


def test_score_of_logits() -> None:
    logits = floats(2, 1, 0, 3, 5, 4, -1, -2).reshape(4, 2)  # 0, 1, 0, 0
    scores = score_task(BUILT_IN["MRPC"], logits, ints(0, 1, 1, 0))
    assert scores == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert task_score(BUILT_IN["MRPC"], scores) == pytest.approx((0.75 + 2 / 3) / 2)
    assert score_task(BUILT_IN["CoLA"], logits, ints(0, 1, 1, 0)) == {"matthews": pytest.approx(1 / math.sqrt(3))}


def test_f1_of_a_task_with_three_labels_of_which_two_occur() -> None:
    spec = replace(BUILT_IN["MNLI"], metrics=("f1",))
    logits = np.eye(3)[[0, 1, 1]]
    assert score_task(spec, logits, ints(0, 1, 0)) == {"f1": pytest.approx((2 / 3 + 2 / 3) / 2)}
    assert score_task(spec, logits, ints(0, 0, 0)) == {"f1": pytest.approx((1 / 2 + 0) / 2)}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_score_of_a_regression(shape: tuple[int, ...]) -> None:
    scores = score_task(BUILT_IN["STS-B"], floats(1, 2, 3, 9).reshape(shape), floats(0, 1, 2, 3))
    assert scores == {"pearson": pytest.approx(pearsonr([1, 2, 3, 9], [0, 1, 2, 3])[0]), "spearman": pytest.approx(1.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_model_scores_zero(value: float) -> None:
    logits = floats(2, 1, value, 3).reshape(2, 2)
    assert score_task(BUILT_IN["QQP"], logits, ints(0, 1)) == {"accuracy": 0.0, "f1": 0.0}
    assert score_task(BUILT_IN["STS-B"], floats(1, value), floats(1, 2)) == {"pearson": 0.0, "spearman": 0.0}


def test_the_score_of_squad_is_f1() -> None:
    assert task_score(BUILT_IN["SQuAD-v2"], {"exact_match": 0.5, "f1": 0.8, "has_answer_f1": 0.1}) == 0.8


def test_glue_average() -> None:
    scores = {"CoLA": 0.1, "SST-2": 0.9, "RTE": 0.5, "WNLI": 0.3, "SQuAD-v2": 0.7, "mine": 1.0}
    assert glue_average(scores) == {"glue": pytest.approx(0.5), "glue_without_cola": pytest.approx(0.7)}
    assert glue_average({"CoLA": 0.1, "WNLI": 0.3}) == {"glue": pytest.approx(0.1)}
    assert glue_average({"WNLI": 0.3, "mine": 1.0}) == {}
