"""Scores of predictions: GLUE's metrics, each a pure function of full arrays (ranks are gathered before)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.records.stats import mean_ranks
from engine.tasks.specs import GLUE_TASKS, TaskSpec

Predictions = npt.NDArray[Any]
CLASS_METRICS = ("accuracy", "f1", "matthews")


def compute(name: str, predictions: Predictions, targets: Predictions, *, labels: int | None = None) -> float:
    """Returns one metric over n >= 1 rows, computed in float64; never nan.

    accuracy, f1, matthews: (n,) label indices. `labels` is how many there can be; unset: as many as occur, at least
    two. f1 of two labels is that of label 1; of more, the mean over the labels that occur in predictions or targets.
    pearson, spearman: (n,) finite numbers; equal values get their mean rank.

    What is undefined is 0.0, as in scikit-learn: f1 without any label 1 in predictions and targets, matthews with one
    label only in predictions or targets. So is a correlation with constant predictions or targets.
    """
    assert predictions.shape == targets.shape, (predictions.shape, targets.shape)
    assert predictions.ndim == 1, predictions.shape
    assert len(predictions) > 0
    if name in CLASS_METRICS:
        confusion = _confusion(predictions, targets, labels)
        return {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews}[name](confusion)
    if name == "pearson":
        return _pearson(predictions, targets)
    assert name == "spearman", name
    # until torchmetrics > 1.9: its spearman_corrcoef adds an epsilon, so that equal rankings are not 1
    return _pearson(mean_ranks(predictions), mean_ranks(targets))


def score_task(spec: TaskSpec, outputs: Predictions, targets: Predictions) -> dict[str, float]:
    """Returns each metric of a classification or regression by name, in [0, 1] or [-1, 1].

    `outputs`: (n, labels) logits, or (n,) or (n, 1) predictions of a regression. Where any of them is not finite, the
    model has diverged, and every metric is 0.0.
    """
    assert spec.kind in ("classification", "regression"), spec.name
    if not np.isfinite(outputs).all():
        return dict.fromkeys(spec.metrics, 0.0)
    if spec.kind == "regression":
        return {name: compute(name, outputs.reshape(len(outputs)), targets) for name in spec.metrics}
    assert outputs.shape[1] == len(spec.labels), (outputs.shape, spec.labels)
    return {name: compute(name, outputs.argmax(1), targets, labels=len(spec.labels)) for name in spec.metrics}


def task_score(spec: TaskSpec, metrics: Mapping[str, float]) -> float:
    """Returns the one number of a split: the mean of the metrics that count."""
    return math.fsum(metrics[name] for name in spec.counted_metrics) / len(spec.counted_metrics)


def glue_average(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns means over the GLUE tasks among `scores` (by official spelling).

    `glue`: all but WNLI, which is left out by custom: its dev split contradicts its training rows.
    `glue_without_cola`: without CoLA as well, as in some papers on small students. A key is absent when no task is
    left for it.
    """
    counted = {name: scores[name] for name in GLUE_TASKS if name in scores and name != "WNLI"}
    others = {name: score for name, score in counted.items() if name != "CoLA"}
    means = {"glue": counted, "glue_without_cola": others}
    return {key: math.fsum(part.values()) / len(part) for key, part in means.items() if part}


def _confusion(predictions: Predictions, targets: Predictions, labels: int | None) -> list[list[int]]:
    """Returns counts, rows by target, columns by prediction; Python integers, whose products cannot overflow."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    count = labels or max(2, int(max(predictions.max(), targets.max())) + 1)
    given, wanted = (torch.as_tensor(np.asarray(values, np.int64)) for values in (predictions, targets))
    matrix: list[list[int]] = multiclass_confusion_matrix(given, wanted, num_classes=count).tolist()
    return matrix


def _accuracy(confusion: list[list[int]]) -> float:
    return sum(row[i] for i, row in enumerate(confusion)) / sum(map(sum, confusion))


def _f1(confusion: list[list[int]]) -> float:
    occurring = [sum(row) + sum(column) for row, column in zip(confusion, zip(*confusion, strict=True), strict=True)]
    counted = [1] if len(confusion) == 2 else [i for i, rows in enumerate(occurring) if rows]
    return math.fsum(2 * confusion[i][i] / max(1, occurring[i]) for i in counted) / len(counted)


def _matthews(confusion: list[list[int]]) -> float:
    """Computes Gorodkin's form for any number of labels."""
    # until torchmetrics > 1.9: its own gives 1.0 where there is one label only
    total, correct = sum(map(sum, confusion)), sum(row[i] for i, row in enumerate(confusion))
    by_target = [sum(row) for row in confusion]
    by_prediction = [sum(column) for column in zip(*confusion, strict=True)]
    covariance = correct * total - sum(t * p for t, p in zip(by_target, by_prediction, strict=True))
    spread = (total**2 - sum(t * t for t in by_target)) * (total**2 - sum(p * p for p in by_prediction))
    return covariance / math.sqrt(spread) if spread else 0.0


def _pearson(predictions: Predictions, targets: Predictions) -> float:
    import torch
    from torchmetrics.functional.regression import pearson_corrcoef

    given, wanted = (np.asarray(values, np.float64) for values in (predictions, targets))
    # until torchmetrics > 1.9: nan and a warning, or noise of rounding
    if np.ptp(given) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(pearson_corrcoef(torch.as_tensor(given), torch.as_tensor(wanted)))
