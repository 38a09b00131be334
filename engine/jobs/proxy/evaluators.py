"""How a proxy job scores a student: probes on frozen features, or a short fine-tuning of a copy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from engine.data.batch import Batch
from engine.errors import UserError
from engine.jobs.execution import plan_execution
from engine.jobs.proxy.plan import OwnEvaluator, ProxyPlan
from engine.models.fit import longest_input
from engine.models.pooling import pool
from engine.ranks import watchdog
from engine.ranks.collectives import from_rank_zero, gather_rows
from engine.ranks.runtime import Runtime, StopRequest
from engine.records.run_dir import RunDir
from engine.tasks.encode import EncodedTask, encode_split, encode_task
from engine.tasks.load import TaskData, hold_out
from engine.tasks.loader import evaluation_batches
from engine.tasks.metrics import score_task, task_score
from engine.tasks.model import load_task_model
from engine.tasks.module import TaskModule
from engine.tasks.probe import ProbeFeatures, map_in_threads, probe_outputs
from engine.tasks.rows import Encoded, Split
from engine.tasks.train import Recipe, task_train_config, train_on_task
from engine.train.export import load_export
from engine.train.monitor import Monitor
from engine.train.trainer import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_BATCH = 64


class Student(Protocol):
    """A member of a cohort as an evaluator sees it."""

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """Returns the hidden states of these layers (0: embeddings) in their order, (B, L, D) each."""
        ...

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder. Collective."""
        ...

    @property
    def layers(self) -> int:
        """Number of its layers"""
        ...

    @property
    def seed(self) -> int:
        """Seed that it was distilled with"""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of a student on training rows alone: dev rows are for the final evaluation."""

    metrics: dict[str, dict[str, float]]
    """Values by task and metric."""
    tasks: dict[str, float]
    """Scores by task, each the mean of its metrics."""
    fitness: float = math.nan
    """Fitness by the job's yardstick (engine/records/yardstick.py); nan before there is one."""


class Evaluator(Protocol):
    """A way to score students."""

    tokens: torch.Tensor | None
    """(n,) int64 ids that the student itself meets when it is scored, each once; None: any."""

    def __call__(self, student: Student) -> Scores:
        """Returns the scores of a student, the same on every rank. Collective."""
        ...


class _Rows(NamedTuple):
    """Where a task's texts lie in the one big table."""

    first: slice
    second: slice | None


class ProbeEvaluator:
    """Probes on frozen features. The texts of all tasks are tokenised once, as one table, which a student reads in one
    sweep."""

    def __init__(
        self,
        tasks: Sequence[TaskData],
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int,
        folds: int,
        runtime: Runtime,
    ) -> None:
        self._tasks, self._runtime, self._folds = tasks, runtime, folds
        self._every_layer = any(task.spec.every_layer for task in tasks)
        texts: list[str] = []
        self._rows: dict[str, _Rows] = {}

        def table(rows: list[str] | None) -> slice | None:
            if rows is None:
                return None
            texts.extend(rows)
            return slice(len(texts) - len(rows), len(texts))

        for task in tasks:
            split = _training_rows(task)
            first = table(split.first)
            assert first is not None
            self._rows[task.spec.name] = _Rows(first, table(split.second))
        seq_len = min(longest, max(task.spec.defaults.seq_len for task in tasks))
        self._encoded: Encoded = encode_split(texts, None, tokenizer, seq_len=seq_len)
        self._pad_id = tokenizer.pad_token_id or 0
        self.tokens: torch.Tensor | None = torch.from_numpy(
            np.union1d(self._encoded.ids, [self._pad_id]).astype(np.int64)
        )

    def __call__(self, student: Student) -> Scores:
        """Returns the scores of a student, which depend on no seed. Collective."""
        features = self._features(student)
        metrics: dict[str, dict[str, float]] = {}
        for task in self._tasks:
            watchdog.beat()
            at = self._rows[task.spec.name]
            states = features if task.spec.every_layer else features[:, -1:]
            first, second = (None if rows is None else states[rows].flatten(1) for rows in (at.first, at.second))
            assert first is not None
            rows = ProbeFeatures(first, second)
            metrics[task.spec.name] = _cross_validated(task, rows, self._folds)
        return scores_of(self._tasks, metrics)

    def _features(self, student: Student) -> torch.Tensor:
        """Returns mean-pooled hidden states (texts, layers, D) in float32 on the CPU: of the last layer, or of all and
        the embeddings if a task wants them. Collective."""
        layers = frozenset(range(0 if self._every_layer else student.layers, student.layers + 1))
        device = self._runtime.device
        batches = evaluation_batches(
            self._encoded,
            pad_id=self._pad_id,
            batch_size=PROBE_BATCH,
            rank=self._runtime.rank,
            world=self._runtime.world_size,
        )
        pooled, rows = [], []
        with torch.no_grad():
            for batch in batches:
                on_device = batch.to(device)
                states = student.hidden(on_device, layers)
                pooled.append(torch.stack([pool(state, on_device.attention_mask) for state in states], dim=1))
                assert batch.rows is not None
                rows.append(batch.rows)
                watchdog.beat()
        return gather_rows(torch.cat(pooled), torch.cat(rows), total=len(self._encoded)).cpu()


def _training_rows(task: TaskData) -> Split:
    rows = task.splits["train"]
    assert isinstance(rows, Split)
    return rows


def _cross_validated(task: TaskData, rows: ProbeFeatures, folds: int) -> dict[str, float]:
    """Returns metrics over all training rows; row i is scored by the probe that was trained without rows i mod `folds`.
    A similarity task has nothing to train."""
    labels = _training_rows(task).labels
    assert labels is not None
    if task.spec.similarity:
        return score_task(task.spec, probe_outputs(task.spec, None, None, {"rows": rows})["rows"], labels)
    fold = torch.arange(len(labels)) % folds

    def only(chosen: torch.Tensor) -> ProbeFeatures:
        return ProbeFeatures(rows.first[chosen], None if rows.second is None else rows.second[chosen])

    def held_out(k: int) -> np.ndarray[Any, Any]:
        rest = fold != k
        parts = {"held out": only(~rest)}
        outputs = probe_outputs(task.spec, only(rest), labels[rest.numpy()], parts)["held out"]
        watchdog.beat()
        return outputs

    by_fold = map_in_threads(held_out, range(folds))
    outputs = np.zeros((len(labels), *by_fold[0].shape[1:]), by_fold[0].dtype)
    for k, values in enumerate(by_fold):
        outputs[(fold == k).numpy()] = values
    return score_task(task.spec, outputs, labels)


def scores_of(tasks: Sequence[TaskData], metrics: dict[str, dict[str, float]]) -> Scores:
    """Returns the scores that these metrics make, without a fitness."""
    return Scores(metrics, {task.spec.name: task_score(task.spec, metrics[task.spec.name]) for task in tasks})


class ProgramEvaluator:
    """The evaluator of a program, which rank 0 asks about an exported copy."""

    tokens: torch.Tensor | None = None

    def __init__(self, score: OwnEvaluator, tasks: Sequence[str], device: torch.device, scratch: Path) -> None:
        """scratch: a folder of rank 0's host; a student lies there until it is loaded."""
        self._score, self._tasks, self._device, self._scratch = score, tasks, device, scratch

    def __call__(self, student: Student) -> Scores:
        """Returns the scores of a student. Collective. Raises UserError on every rank unless there is a finite one of
        each task."""
        student.save(self._scratch)
        watchdog.rest()
        tasks = from_rank_zero(self._ask)
        watchdog.beat()
        return Scores({task: {"score": score} for task, score in tasks.items()}, tasks)

    def _ask(self) -> dict[str, float]:
        model = load_export(self._scratch)
        shutil.rmtree(self._scratch)
        model.to(self._device)  # type: ignore[arg-type]
        scores = {task: float(score) for task, score in self._score(model).items()}
        if scores.keys() != set(self._tasks):
            raise UserError(
                f"proxy.tasks and proxy.other_tasks are {', '.join(self._tasks)}, but the evaluator returns scores of "
                f"{', '.join(scores) or 'nothing'}: name the same"
            )
        if wrong := [task for task, score in scores.items() if not math.isfinite(score)]:
            raise UserError(f"the evaluator returns no finite score of {', '.join(wrong)}")
        return {task: scores[task] for task in self._tasks}


class Stopped(Exception):
    """The job was told to stop while a student was being scored."""


class FinetuneEvaluator:
    """A short fine-tuning of a copy on each task, with the settings of the `proxy` section. Tasks are tokenised
    once."""

    def __init__(self, plan: ProxyPlan, runtime: Runtime, stop: StopRequest, scratch: Path) -> None:
        """Tokenises the tasks. scratch: a folder that all ranks see; a student lies there while it is scored."""
        self._plan, self._runtime, self._scratch = plan, runtime, scratch
        self._stop = stop
        self.tokens: torch.Tensor | None = torch.empty(
            0, dtype=torch.int64
        )  # a copy with the whole vocabulary is fine-tuned
        longest = longest_input(plan.base.student_config)
        self._tasks = []
        for data in (hold_out(task, parts=plan.config.proxy.folds) for task in plan.tasks):
            seq_len = min(data.spec.defaults.seq_len, longest or data.spec.defaults.seq_len)
            self._tasks.append(encode_task(data, plan.base.tokenizer, seq_len=seq_len))

    def __call__(self, student: Student) -> Scores:
        """Returns the scores of a student. Collective. Raises Stopped."""
        student.save(self._scratch)
        watchdog.beat()
        metrics = {task.spec.name: self._fine_tune(task, student.seed) for task in self._tasks}
        torch.distributed.barrier()
        if self._runtime.is_rank_zero:
            shutil.rmtree(self._scratch)
        return scores_of(self._plan.tasks, metrics)

    def _fine_tune(self, task: EncodedTask, seed: int) -> dict[str, float]:
        proxy, config = self._plan.config.proxy, self._plan.config
        train = task_train_config(len(task.train), epochs=proxy.epochs, lr=proxy.lr, batch=proxy.batch)
        execution = plan_execution(self._plan.base.config.deepspeed_config, train, config.optim)
        model = load_task_model(
            str(self._scratch),
            key="student",
            spec=task.spec,
            dropout=0.0,  # random numbers cost more than the forward on a CPU, and proxies are short
            seed=seed,
            backend=self._plan.base.student_attention.name,
        )
        result = train_on_task(
            TaskModule(model, kind=task.spec.kind, unpadded=config.kernels.unpadded),
            task,
            Recipe(train=train, optim=config.optim, execution=execution, seed=seed, eval_every=train.steps),
            runtime=self._runtime,
            stop=self._stop,
            monitor=Monitor.silent(RunDir(Path(config.output_dir)), steps=train.steps, device=self._runtime.device),
        )
        if result.outcome is Outcome.PREEMPTED:
            raise Stopped
        if result.outcome is Outcome.DIVERGED:
            return dict.fromkeys(task.spec.metrics, 0.0)  # as score_task has it for outputs that are not finite
        return result.metrics


def build_evaluator(plan: ProxyPlan, runtime: Runtime, stop: StopRequest, scratch: Path) -> Evaluator:
    """Returns the evaluator of the program, or the one that proxy.evaluator names. scratch: a folder that all ranks
    see."""
    if plan.own_evaluator is not None:
        return ProgramEvaluator(plan.own_evaluator, plan.scored, runtime.device, scratch)
    if plan.config.proxy.evaluator == "finetune":
        return FinetuneEvaluator(plan, runtime, stop, scratch)
    longest = longest_input(plan.base.student_config) or plan.base.seq_len
    folds = plan.config.proxy.folds
    return ProbeEvaluator(plan.tasks, plan.base.tokenizer, longest=longest, folds=folds, runtime=runtime)
