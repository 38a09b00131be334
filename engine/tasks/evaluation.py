"""Dev scores between steps, early stopping by them, and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.ranks import watchdog
from engine.ranks.collectives import gathered
from engine.ranks.runtime import Runtime
from engine.tasks.encode import EncodedTask
from engine.tasks.load import TaskData
from engine.tasks.loader import evaluation_batches
from engine.tasks.metrics import score_task, task_score
from engine.tasks.predictions import decode, squad_metrics
from engine.tasks.rows import Split
from engine.tasks.specs import TaskSpec
from engine.tasks.squad import SquadSplit, Windows
from engine.train import failures
from engine.train.trainee import Trainee

Outputs = npt.NDArray[Any] | dict[str, str]
"""Outputs for a split, in the order of its rows: (n, labels) logits or (n, 1) predictions; question id -> answer of
a span task."""


@dataclass
class Best:
    """The evaluation that early stopping keeps."""

    score: float = -math.inf
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class TaskEvaluation:
    """An Evaluation (engine/train/trainer.py) of one fine-tuning. Collective; every rank sees all outputs, so that
    all decide alike, and the scores do not depend on how rows were shared out."""

    trainee: Trainee
    task: EncodedTask
    batch_size: int
    """Rows per rank and forward."""
    global_batch: int
    """Rows per optimizer step: decides when an epoch ends."""
    every: int | None = None
    """Optimizer steps between evaluations; None: once per epoch. One more comes at the end."""
    patience: int | None = None
    """Evaluations without a better score after which it is enough; None: never."""
    best: Best = field(default_factory=Best)
    """The best evaluation with patience, else the last one."""
    bad: int = 0
    """Evaluations since the best one."""
    at_start: bool = False

    @property
    def enough(self) -> bool:
        return self.patience is not None and self.bad >= self.patience

    def due(self, step: int, *, last: bool) -> bool:
        if last:
            return True
        if self.every is not None:
            return step % self.every == 0
        epochs_before, epochs_now = ((s * self.global_batch) // len(self.task.train) for s in (step - 1, step))
        return epochs_now > epochs_before

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps; `keep_step` says to the Checkpointer which checkpoint must stay."""
        kept = {"score": self.best.score, "step": self.best.step, "metrics": self.best.metrics, "bad": self.bad}
        return {"evaluation": kept, "keep_step": self.best.step if self.patience is not None else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from the `state` that a checkpoint holds."""
        kept = state["evaluation"]
        self.best = Best(kept["score"], kept["step"], dict(kept["metrics"]))
        self.bad = kept["bad"]

    def __call__(self, step: int) -> bool:
        """Scores the dev splits. Returns with patience whether they are the best so far (the checkpoint is then
        kept)."""
        trainee = self.trainee
        measured = score_dev(trainee.model, self.task, runtime=trainee.runtime, batch_size=self.batch_size)
        if measured is None:
            self._diverged(step)
            return False
        score, metrics = measured
        epochs = float(Fraction(step * self.global_batch, len(self.task.train)))
        self.trainee.monitor.scores(step, {**metrics, "score": score}, epoch=round(epochs, 4))
        better = score > self.best.score
        if better or self.patience is None:
            self.best = Best(score, step, metrics)
        self.bad = 0 if better else self.bad + 1
        return better and self.patience is not None

    def _diverged(self, step: int) -> None:
        """Ends the trainee: outputs that are not finite have no score."""
        if self.trainee.check_weights(step):  # says so itself when they are the reason
            self.trainee.diverged = True
            self.trainee.monitor.report(failures.outputs_not_finite(step))


def score_dev(
    model: Any, task: EncodedTask, *, runtime: Runtime, batch_size: int
) -> tuple[float, dict[str, float]] | None:
    """Returns score (the mean over the dev splits) and metrics by name; None where an output is not finite. Collective.

    model, batch_size: as for `predict_split`.
    """
    spec, scores = task.spec, []
    named: dict[str, float] = {}
    for name in spec.dev_splits:
        outputs = predict_split(model, task, name, runtime=runtime, batch_size=batch_size)
        if outputs is None:
            return None
        metrics = _metrics(task, name, outputs)
        scores.append(task_score(spec, metrics))
        ending = f"_{name.removeprefix('dev_')}" if len(spec.dev_splits) > 1 else ""
        named |= {metric + ending: value for metric, value in metrics.items()}
    return math.fsum(scores) / len(scores), named


@dataclass(frozen=True)
class ConstantAnswer:
    """The best score of a constant answer on the dev splits: what a model has to beat."""

    answer: str
    """A label, "no answer" for spans, "the mean" for regressions."""
    score: float
    metrics: dict[str, float]
    """Means over the dev splits, by name."""


def constant_answer(data: TaskData) -> ConstantAnswer:
    """Returns the best answer to everything, by the score of a task's dev splits."""
    spec = data.spec
    found = []
    for number, answer in enumerate(_constants(spec)):
        by_split = []
        for name in spec.dev_splits:
            split = data.splits[name]
            if isinstance(split, SquadSplit):
                by_split.append(squad_metrics(split, dict.fromkeys(split.ids, "")))
                continue
            assert isinstance(split, Split), name
            assert split.labels is not None, f"{name} is unlabelled"
            outputs = np.zeros((len(split), max(1, len(spec.labels))))
            outputs[:, number] = 1.0
            by_split.append(score_task(spec, outputs, split.labels))
        metrics = {name: float(np.mean([one[name] for one in by_split])) for name in by_split[0]}
        found.append(ConstantAnswer(answer, task_score(spec, metrics), metrics))
    return max(found, key=lambda one: one.score)


def _constants(spec: TaskSpec) -> Sequence[str]:
    if spec.kind == "classification":
        return [repr(label) for label in spec.labels]
    return ["no answer"] if spec.kind == "span" else ["the mean"]


def _metrics(task: EncodedTask, name: str, outputs: Outputs) -> dict[str, float]:
    if isinstance(outputs, dict):
        split = task.splits[name]
        assert isinstance(split, SquadSplit)
        return squad_metrics(split, outputs)
    targets = task.rows(name).targets
    assert targets is not None, f"{name} is unlabelled"
    return score_task(task.spec, outputs, targets)


def predict_split(model: Any, task: EncodedTask, name: str, *, runtime: Runtime, batch_size: int) -> Outputs | None:
    """Returns the outputs for a dev or test split on every rank; None where one of them is not finite. Collective.

    model: TaskModule, or the DeepSpeedModel around one; left in train mode. batch_size: rows per rank and forward.
    """
    by_row = _outputs(model, task, name, runtime, batch_size)
    if not all(np.isfinite(row).all() for row in by_row):
        return None
    part, split = task.parts[name], task.splits[name]
    if not isinstance(part, Windows):
        return np.stack(by_row)
    assert isinstance(split, SquadSplit)
    starts, ends = [row[:, 0] for row in by_row], [row[:, 1] for row in by_row]
    return decode(part, split, starts, ends, v2=task.spec.name == "SQuAD-v2")


@torch.no_grad()
def _outputs(
    model: Any, task: EncodedTask, name: str, runtime: Runtime, batch_size: int
) -> list[npt.NDArray[np.float32]]:
    """Returns the logits of each row: (labels,), or (L, 2) of the real tokens of a span's window."""
    encoded = task.rows(name)
    spans, lengths = task.spec.kind == "span", encoded.lengths
    batches = evaluation_batches(
        encoded,
        pad_id=task.pad_id,
        batch_size=batch_size,
        rank=runtime.rank,
        world=runtime.world_size,
        pin_memory=runtime.device.type == "cuda",
    )
    found: dict[int, npt.NDArray[np.float32]] = {}
    model.eval()
    for batch in batches:
        assert batch.rows is not None
        logits = model(batch.to(runtime.device)).cpu().numpy()
        for row, values in zip(batch.rows.tolist(), logits, strict=True):
            if row >= 0:
                found[row] = values[: lengths[row]].copy() if spans else values
        watchdog.beat()
    model.train()
    found = {row: values for share in gathered(found) for row, values in share.items()}
    assert len(found) == len(encoded), f"{name}: {len(found)} of {len(encoded)} rows came back"
    return [found[row] for row in range(len(encoded))]
