"""How a proxy job scores a student: vectors and probes of frozen features, or a short fine-tuning of a copy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from engine.data.batch import Batch
from engine.errors import UserError
from engine.hub.sentence import SentenceEncoder, read_sentence_encoder
from engine.jobs.execution import plan_execution
from engine.jobs.proxy.plan import OwnEvaluator, ProxyPlan
from engine.models.fit import longest_input
from engine.ranks import watchdog
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime, StopRequest
from engine.records.run_dir import RunDir
from engine.tasks.encode import EncodedTask, encode_task
from engine.tasks.load import TaskData, hold_out
from engine.tasks.metrics import score_task, task_score
from engine.tasks.model import load_task_model
from engine.tasks.module import TaskModule
from engine.tasks.probe import ProbeFeatures, map_in_threads, probe_outputs
from engine.tasks.rows import Split
from engine.tasks.texts import TaskTexts, scored_split, zero_shot_metrics
from engine.tasks.train import Recipe, task_train_config, train_on_task
from engine.tasks.vectors import TextVectors
from engine.train.export import load_export
from engine.train.monitor import Monitor
from engine.train.trainer import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


class ProbeEvaluator:
    """Zero-shot scores and probes on frozen features. The texts of all tasks are tokenised once, as one table, which a
    student reads in one sweep."""

    def __init__(
        self,
        tasks: Sequence[TaskData],
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int,
        folds: int,
        runtime: Runtime,
        sentence: SentenceEncoder | None = None,
    ) -> None:
        """sentence: what makes the vectors of zero-shot scores, the teacher's; None: means."""
        self._tasks, self._runtime, self._folds = tasks, runtime, folds
        seq_len = min(longest, max(task.spec.defaults.seq_len for task in tasks))
        splits = {task.spec.name: (task.spec, scored_split(task, "train")) for task in tasks}
        self._texts = TaskTexts(splits, tokenizer, TextVectors(sentence), seq_len=seq_len)
        self.tokens: torch.Tensor | None = self._texts.tokens

    def __call__(self, student: Student) -> Scores:
        """Returns the scores of a student, which depend on no seed. Collective."""
        features = self._texts.features(student.hidden, student.layers, self._runtime)
        metrics: dict[str, dict[str, float]] = {}
        for task in self._tasks:
            watchdog.beat()
            rows = features.part(task.spec.name)
            if task.spec.is_zero_shot:
                metrics[task.spec.name] = zero_shot_metrics(task.spec, scored_split(task, "train"), rows)
            else:
                metrics[task.spec.name] = _cross_validated(task, rows, self._folds)
        return scores_of(self._tasks, metrics)


def _cross_validated(task: TaskData, rows: ProbeFeatures, folds: int) -> dict[str, float]:
    """Returns metrics over all training rows; row i is scored by the probe that was trained without rows i mod
    `folds`."""
    split = scored_split(task, "train")
    assert isinstance(split, Split)
    labels = split.labels
    assert labels is not None
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
    sentence, _ = read_sentence_encoder(plan.config.teacher.path, "teacher.path")
    return ProbeEvaluator(
        plan.tasks, plan.base.tokenizer, longest=longest, folds=folds, runtime=runtime, sentence=sentence
    )
