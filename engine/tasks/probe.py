"""Scores of frozen features without fine-tuning: cosine, logistic and ridge regression. No random numbers, so that one
student always gets one score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize, one_hot

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.tasks.specs import TaskSpec

Outputs = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]

GRADIENT_TOLERANCE = 1e-8
"""Largest entry of the preconditioned gradient at which the logistic regression counts as solved: with default_l2,
logits are then within about 1e-6 of the optimum (measured against scikit-learn on SST-2, CoLA and MRPC)."""
MOST_ITERATIONS = 100
"""Iterations of LBFGS at most. 7 to 19 were needed on real features with default_l2. Rows that a plane separates, with
l2 below about 1e-3, need more: the logits then stop short of the optimum (by 1e-2 of 27 at l2 = 1e-4, by 2 of 35 at
1e-5)."""
DEV_CHUNK = 4096
"""Dev rows that are held in float64 at a time."""


@dataclass(frozen=True)
class ProbeFeatures:
    """The pooled texts of one split."""

    first: torch.Tensor
    """(n, D) float32."""
    second: torch.Tensor | None
    """(n, D) float32 second text of each pair; None for single texts."""


def pair_features(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns (n, 2D) float32 of two (n, D): |u - v| and u * v of the rows u, v scaled to length 1."""
    u, v = (normalize(rows.double(), dim=1).float() for rows in (first, second))
    return torch.cat([(u - v).abs(), u * v], 1)


def cosine(first: torch.Tensor, second: torch.Tensor) -> Outputs:
    """Returns the (n,) cosines of the rows of two (n, D); 0 where one of a pair is 0."""
    return (normalize(first.double(), dim=1) * normalize(second.double(), dim=1)).sum(1).numpy()


def default_l2(features: torch.Tensor) -> float:
    """Returns D / n for (n, D) training features: weights with prior variance 1 / D, so that a logit (or a standardised
    target) has prior variance of about 1 however wide the student is."""
    return features.shape[1] / len(features)


def logistic_probe(
    train: torch.Tensor, labels: Labels, dev: torch.Tensor, *, classes: int, l2: float
) -> npt.NDArray[np.float64]:
    """Returns the (m, classes) logits of (m, D) dev features, fitted to (n, D) features and (n,) label indices.

    It is a multinomial logistic regression on features with mean 0 and variance 1 over the training rows: the least
    mean cross-entropy + l2 / 2 * (sum of squared weights), intercepts free (scikit-learn's C = 1 / (l2 * n); for two
    classes 2 / (l2 * n), since it has one weight vector there and we have two). A class without a training row is
    never the largest logit. All logits are nan when a training feature is not finite.
    """
    assert l2 > 0, l2
    assert len(train) == len(labels) > 0, (train.shape, labels.shape)
    present, targets = np.unique(labels, return_inverse=True)
    assert 0 <= present[0] <= present[-1] < classes, (present, classes)
    if not _finite(train):
        return np.full((len(dev), classes), np.nan)
    scale = _Scale.from_rows(train)
    weights = _fit_logistic(scale(train), torch.from_numpy(targets), classes=len(present), l2=l2)
    fitted = _apply(scale, weights, dev)
    logits = np.repeat(fitted.min(1, keepdims=True) - 1.0, classes, axis=1)
    logits[:, present] = fitted
    return logits


def ridge_probe(train: torch.Tensor, targets: Labels, dev: torch.Tensor, *, l2: float) -> Outputs:
    """Returns the (m,) predictions of (m, D) dev features, fitted to (n, D) features and (n,) numbers.

    It is least squares on features with mean 0 and variance 1 over the training rows: the least mean squared error
    + l2 * (sum of squared weights), intercept free (scikit-learn's Ridge: alpha = l2 * n). All predictions are nan when
    a training feature is not finite.
    """
    assert l2 > 0, l2
    assert len(train) == len(targets) > 0, (train.shape, targets.shape)
    if not _finite(train):
        return np.full(len(dev), np.nan)
    scale = _Scale.from_rows(train)
    rows = scale(train)
    wanted = torch.from_numpy(np.asarray(targets, np.float64))
    middle = wanted.mean()
    factor = _factor(rows, share=1.0, l2=l2)
    slopes = torch.cholesky_solve((rows.T @ (wanted - middle))[:, None] / len(rows), factor)
    return _apply(scale, torch.cat([slopes, middle.reshape(1, 1)]), dev)[:, 0]


def probe_outputs(
    spec: TaskSpec, train: ProbeFeatures | None, train_labels: Labels | None, dev: dict[str, ProbeFeatures]
) -> dict[str, Outputs]:
    """Returns the outputs of each dev split as engine.tasks.metrics.score_task takes them: cosine for similarity tasks,
    where `train` and `train_labels` are not read; (m, labels) logits of a classification; predictions of another
    regression. Pairs are seen as pair_features. Where a student's features are not finite, neither are its outputs.

    Raises UserError for a span task.
    """
    if spec.kind == "span":
        raise UserError(
            f"proxy.tasks={spec.name!r}: a probe cannot score spans of text; write proxy.evaluator=finetune"
        )
    with _one_thread():
        if spec.similarity:
            return {name: _similarity(features) for name, features in dev.items()}
        assert train is not None, spec.name
        assert train_labels is not None, spec.name
        rows = _features(train)
        together = torch.cat([_features(part) for part in dev.values()])  # one fit for all dev splits
        if spec.kind == "regression":
            outputs = ridge_probe(rows, train_labels, together, l2=default_l2(rows))
        else:
            classes = len(spec.labels)
            outputs = logistic_probe(rows, train_labels, together, classes=classes, l2=default_l2(rows))
    ends = np.cumsum([len(part.first) for part in dev.values()])
    return dict(zip(dev, np.split(outputs, ends[:-1]), strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Makes torch use one thread: the same sums for any number of cores, and many short parallel loops wait long where
    cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_in_threads(fit: Callable[[int], Outputs], numbers: Sequence[int]) -> list[Outputs]:
    """Returns `fit` of each number, as many at once as torch has threads; each with one thread, so always the same
    sums."""
    workers = torch.get_num_threads()
    with _one_thread(), ThreadPoolExecutor(workers) as pool:  # a new thread takes over the setting
        return list(pool.map(fit, numbers))


def _similarity(pairs: ProbeFeatures) -> Outputs:
    assert pairs.second is not None
    return cosine(pairs.first, pairs.second)


def _features(texts: ProbeFeatures) -> torch.Tensor:
    return texts.first if texts.second is None else pair_features(texts.first, texts.second)


def _finite(features: torch.Tensor) -> bool:
    return bool(torch.isfinite(features).all())


@dataclass(frozen=True)
class _Scale:
    """Features to mean 0 and variance 1. A feature that is constant in the training rows becomes 0 everywhere."""

    mean: torch.Tensor
    inverse: torch.Tensor

    @staticmethod
    def from_rows(train: torch.Tensor) -> _Scale:
        rows = train.double()
        mean = rows.mean(0)
        deviation = (rows - mean).square_().mean(0).sqrt_()  # torch.var_mean over columns is three times slower
        # Below a millionth of the mean there is nothing but the rounding of float32.
        constant = deviation <= 1e-6 * mean.abs()
        return _Scale(mean, torch.where(constant, 0.0, 1.0 / deviation))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the (n, D) features scaled, float64."""
        return (features.double() - self.mean).mul_(self.inverse)


def _apply(scale: _Scale, weights: torch.Tensor, features: torch.Tensor) -> Outputs:
    """Returns the (m, K) outputs of (m, D) features and (D + 1, K) weights, the intercept in the last row."""
    chunks = [scale(chunk) @ weights[:-1] + weights[-1] for chunk in features.split(DEV_CHUNK)]
    return torch.cat(chunks).numpy()


def _factor(rows: torch.Tensor, *, share: float, l2: float) -> torch.Tensor:
    """Returns the lower Cholesky factor (D, D) of share * rows^T rows / n + l2 * identity."""
    gram = rows.T @ rows
    gram *= share / len(rows)
    gram.diagonal().add_(l2)
    return torch.linalg.cholesky(gram)


def _fit_logistic(rows: torch.Tensor, targets: torch.Tensor, *, classes: int, l2: float) -> torch.Tensor:
    """Returns the (D + 1, classes) weights of (n, D) standardised rows and (n,) classes, the intercept in the last row.

    It runs LBFGS on L^T W, where L L^T is the Hessian at W = 0: at most a few dozen passes over the rows instead of
    hundreds, since the features of small students are nearly collinear.
    """
    wanted = one_hot(targets, classes).double()
    lower = _factor(rows, share=1.0 / classes, l2=l2)
    upper, intercept_scale = lower.T.contiguous(), math.sqrt(classes)
    point = torch.zeros(rows.shape[1] + 1, classes, dtype=torch.float64)

    def weights() -> torch.Tensor:
        slopes = torch.linalg.solve_triangular(upper, point[:-1], upper=True)
        return torch.cat([slopes, intercept_scale * point[-1:]])

    def loss() -> torch.Tensor:
        w = weights()
        logits = rows @ w[:-1] + w[-1]
        total = torch.logsumexp(logits, 1, keepdim=True)
        error = ((logits - total).exp_() - wanted) / len(rows)
        slope = torch.linalg.solve_triangular(lower, rows.T @ error + l2 * w[:-1], upper=False)
        point.grad = torch.cat([slope, intercept_scale * error.sum(0, keepdim=True)])
        return total.mean() - (logits * wanted).sum() / len(rows) + 0.5 * l2 * w[:-1].square().sum()

    solver = torch.optim.LBFGS(
        [point],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-14,  # the gradient decides; this ends a search that stands still
        line_search_fn="strong_wolfe",
    )
    solver.step(loss)
    return weights()
