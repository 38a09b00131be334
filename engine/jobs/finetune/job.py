"""The fine-tuning job: every task with every grid point and seed, one after another, and one table at the end."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.config.distill import TrainConfig
from engine.config.finetune import FinetuneConfig
from engine.errors import UserError
from engine.jobs.finetune import banner
from engine.jobs.finetune.clock import TaskClock
from engine.jobs.finetune.plan import FinetunePlan, PlannedTask, Unit, make_finetune_plan
from engine.jobs.finetune.scores import TaskScore, averages, choose, render_table, speed
from engine.jobs.finetune.unit import Earlier, UnitRun, look_back, remove_checkpoints, score_of
from engine.models.teacher import FrozenTeacher
from engine.ranks import run_lock, watchdog
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime, StopRequest, join_ranks, launcher_rank
from engine.records.events import EventFile
from engine.records.files import relative_link
from engine.records.records import OnRecord
from engine.records.run_dir import EVENT_FILES, RunDir, as_yaml
from engine.tasks.encode import EncodedTask, encode_task
from engine.tasks.evaluation import constant_answer, predict_split, score_dev
from engine.tasks.model import head_problem, load_task_model
from engine.tasks.module import TaskModule, teacher_wanted
from engine.tasks.predictions import write_predictions, write_submission
from engine.train.monitor import Monitor, open_records
from engine.train.optim import build_optimizer
from engine.train.trainer import Outcome


def finetune(config: FinetuneConfig, *, on_record: OnRecord | None = None) -> None:
    """Runs or continues all fine-tunings. Collective. Raises Diverged when a task has no score, Preempted, UserError
    and RunFailure. on_record: is called with each record, on rank 0; those of one fine-tuning have its name as `unit`.
    """
    RunDir(Path(config.output_dir)).require_no_patterns()
    plan = make_finetune_plan(config)
    root = Path(config.output_dir)
    with run_lock.hold(root, writes=launcher_rank() == 0 and not config.dry_run):
        runtime = join_ranks(config.task.seeds[0])
        earlier = {unit.folder: look_back(plan, unit, runtime) for unit in plan.units}
        if not config.dry_run:
            from_rank_zero(lambda: RunDir(root).write_settings(config))
        outcome = FinetuneJob(plan, earlier, runtime, on_record).run()
    outcome.require_done(root)


class FinetuneJob:
    """One start of a job on this rank."""

    def __init__(
        self,
        plan: FinetunePlan,
        earlier: dict[Path, Earlier],
        runtime: Runtime,
        on_record: OnRecord | None = None,
    ) -> None:
        self._on_record = on_record
        self.plan, self.earlier, self.runtime = plan, earlier, runtime
        self.config, self.root = plan.config, Path(plan.config.output_dir)
        self.results: dict[Path, dict[str, Any]] = {
            folder: left.result for folder, left in earlier.items() if left.result is not None
        }

    def run(self) -> Outcome:
        """Runs or continues all fine-tunings, and prints the table. Collective."""
        self._say(self._banner())
        if self.config.dry_run:
            return Outcome.DONE
        path = self.root / "records.jsonl"
        records = open_records(path, on_record=self._on_record) if self.runtime.is_rank_zero else None
        if records is not None:
            records.write("run", status="started", tasks=[t.name for t in self.plan.tasks], **self._facts())
        self.stop = StopRequest()  # not before: until here a signal may simply end the process
        scores: list[TaskScore] = []
        failed: list[str] = []
        for task in self.plan.tasks:
            if not self._run_task(task):
                if records is not None:
                    records.write("run", status="preempted", signal=self.stop.signal)
                self._say("stopped; the same command continues")
                return Outcome.PREEMPTED
            score = self._choose(task)
            if score is None:
                failed.append(task.name)
            else:
                scores.append(score)
        outcome = Outcome.DIVERGED if failed else Outcome.DONE
        if records is not None:
            self._write_tensorboard(scores)
            records.write("result", status=outcome.value, **self._result(scores, failed))
            records.close()
            self._say("\n" + render_table(scores, without_score=failed, absent=self.plan.absent))
            self._say(self._where(scores))
        return outcome

    def _banner(self) -> str:
        """Returns the banner. Raises UserError when `require_fused` is broken."""
        lr = self.plan.tasks[0].points[0].lr
        execution = next(iter(self.plan.executions.values()))
        chosen = build_optimizer(
            self.config.optim, nn.Linear(1, 1), lr=lr, execution=execution, device=self.runtime.device
        )
        if self.config.require_fused:
            chosen.refuse_slower()
        unfinished = [
            f"{unit.name} from {checkpoint.tag}"
            for unit in self.plan.units
            if (checkpoint := self.earlier[unit.folder].chosen) is not None
        ]
        return banner.describe_job(
            self.plan,
            optimizer=str(chosen),
            device=self.runtime.where,
            finished=len(self.results),
            unfinished=unfinished,
        )

    def _run_task(self, task: PlannedTask) -> bool:
        """Runs the fine-tunings of a task that are not finished; returns False when a signal stopped them."""
        pending = [unit for unit in self.plan.units_of(task) if unit.folder not in self.results]
        if not pending:
            return True
        encoded = self._encode(task)
        teacher = self._load_teacher(task, encoded)
        clock = TaskClock(sum(unit.at.epochs for unit in pending))
        for unit in pending:
            if self.stop.requested_anywhere():
                return False
            number, units = self.plan.units.index(unit) + 1, len(self.plan.units)
            self._say(f"\n{unit.name}  (fine-tuning {number} of {units}{clock.time_left(task.name)})")
            chosen = self.earlier[unit.folder].chosen
            run = UnitRun(self.plan, unit, chosen, runtime=self.runtime, stop=self.stop, on_record=self._on_record)
            result = run.run(encoded, teacher)
            if result is None:
                return False
            self.results[unit.folder] = result
            clock.add(unit.at.epochs)
            score = "diverged, no score" if result["score"] is None else f"score {100 * result['score']:.2f}"
            self._say(f"{unit.name}: {score} after {result['steps_run']} steps")
        return True

    def _encode(self, task: PlannedTask) -> EncodedTask:
        return encode_task(task.data, self.plan.tokenizer, seq_len=task.seq_len, doc_stride=self.config.task.doc_stride)

    def _load_teacher(self, task: PlannedTask, encoded: EncodedTask) -> FrozenTeacher | None:
        planned = task.teacher
        if planned is None:
            return None
        model = load_task_model(
            planned.saved.path,
            key="teacher.path",
            spec=task.data.spec,
            dropout=0.0,
            seed=0,
            backend=planned.backend.name,
            head_required=True,
            dtype=getattr(torch, planned.dtype),
        )
        self._score_teacher(task, encoded, model.to(self.runtime.device))  # type: ignore[arg-type]
        wanted = teacher_wanted(self.config.loss, planned.losses)
        return FrozenTeacher(
            model,
            wanted=wanted,
            full_config=model.config,
            device=self.runtime.device,
            unpadded=self.config.kernels.unpadded,
        )

    def _score_teacher(self, task: PlannedTask, encoded: EncodedTask, model: PreTrainedModel) -> None:
        """Prints how good the teacher is before it teaches. Raises UserError for outputs without names that are no
        better than a constant answer: they have another order, most likely. Collective."""
        assert task.teacher is not None
        module = TaskModule(model, kind=task.data.spec.kind, unpadded=self.config.kernels.unpadded)
        batch_size = 2 * self.plan.executions[task.points[0].batch].micro_batch_size
        result = score_dev(module, encoded, runtime=self.runtime, batch_size=batch_size)
        score, constant = math.nan if result is None else result[0], constant_answer(task.data).score
        self._say(f"\nteacher of {task.name}: dev score {100 * score:.2f} (a constant answer: {100 * constant:.2f})")
        if score > constant:
            return
        if head_problem(task.teacher.saved.config, task.data.spec) is not None:
            raise UserError(
                f"{task.teacher.saved}: its dev score on {task.name}, {100 * score:.2f}, is not above that of a "
                f"constant answer, {100 * constant:.2f}, and its outputs have no names: name each in "
                "id2label of its config.json, as its model card says, and they are put into the task's order"
            )
        self._say(
            f"warning: a teacher that is no better than a constant answer teaches little: was it fine-tuned on "
            f"{task.name}, and are the names of its outputs (id2label in config.json) in their true order?"
        )

    def _choose(self, task: PlannedTask) -> TaskScore | None:
        """Returns the task's score at its best point, or None without any; removes the other points' models and writes
        predictions. Collective."""
        units = self.plan.units_of(task)
        score = choose(
            task.name,
            [score_of(unit, self.results[unit.folder]) for unit in units],
            train_rows=task.train_rows,
            epochs={at.point: at.epochs for at in task.points},
        )
        if score is None:
            return None
        first = next(u for u in units if u.at.point == score.chosen and u.seed == score.units[0].seed)
        if self.runtime.is_rank_zero:
            for unit in units:
                remove_checkpoints(RunDir(unit.folder))  # of a start that was killed between result and removal
                if unit.at.point != score.chosen:
                    shutil.rmtree(RunDir(unit.folder).model, ignore_errors=True)
            relative_link(self.root / task.name / "model", RunDir(first.folder).model)
        if self.config.task.predict:
            self._predict(first)
        return score

    def _predict(self, unit: Unit) -> None:
        """Writes the predictions of a finished fine-tuning for its dev and test splits. Collective."""
        encoded = self._encode(unit.task)  # outside the watch: a long text gives no sign of life
        with self._watch_predicting(unit):
            torch.distributed.barrier()  # rank 0 may still be writing the model
            self._predict_splits(unit, encoded)

    def _watch_predicting(self, unit: Unit) -> AbstractContextManager[None]:
        """Ends a rank that hangs inside as one that hangs in training."""
        steps, limit_s = self.results[unit.folder]["steps_run"], TrainConfig.hang_timeout_s
        monitor = Monitor.silent(RunDir(unit.folder), steps=steps, device=self.runtime.device)
        return monitor.watch_hangs("predictions", step=lambda: steps, rank=self.runtime.rank, limit_s=limit_s)

    def _predict_splits(self, unit: Unit, encoded: EncodedTask) -> None:
        task, folder = unit.task, RunDir(unit.folder).model
        if not folder.is_dir():
            self._say(f"no predictions for {task.name}: {folder} was removed; remove {unit.folder} to train it again")
            return
        spec, execution = task.data.spec, self.plan.executions[unit.at.batch]
        student = load_task_model(
            str(folder),
            key="model",
            spec=spec,
            dropout=0.0,
            seed=0,
            backend=task.backend.name,
            head_required=True,
            dtype=getattr(torch, execution.precision),
        )
        student.to(self.runtime.device)  # type: ignore[arg-type]
        module = TaskModule(student, kind=spec.kind, unpadded=self.config.kernels.unpadded)
        for name, split in encoded.splits.items():
            outputs = predict_split(
                module, encoded, name, runtime=self.runtime, batch_size=2 * execution.micro_batch_size
            )
            if not self.runtime.is_rank_zero or outputs is None:
                continue
            target = self.root / "predictions"
            if name in spec.dev_splits:
                target = target / "dev"
            if isinstance(outputs, dict):
                write_predictions(target / f"{spec.name}.json", outputs)
            else:
                write_submission(target, spec, name, split.ids, outputs)
            watchdog.beat()

    def _facts(self) -> dict[str, Any]:
        execution = next(iter(self.plan.executions.values()))
        return {"model": self.config.model.path, "seeds": self.config.task.seeds, **execution.facts}

    def _result(self, scores: Sequence[TaskScore], failed: Sequence[str]) -> dict[str, Any]:
        tasks: dict[str, Any] = {score.task: score.as_record() for score in scores}
        units = [score_of(unit, self.results[unit.folder]) for unit in self.plan.units]
        return {
            "tasks": tasks | dict.fromkeys(failed),
            "averages": averages(scores),
            "absent": list(self.plan.absent),
            "samples_per_s": speed(units),
            **self._facts(),
        }

    def _write_tensorboard(self, scores: Sequence[TaskScore]) -> None:
        folder = RunDir(self.root).tensorboard
        for earlier in folder.glob(f"{EVENT_FILES}*"):  # of an earlier start, which had the same scores or fewer
            earlier.unlink()
        file = EventFile(folder, tell=self._say)
        file.texts({"config": f"```yaml\n{as_yaml(self.config)}\n```"}, 0)
        points = {f"score/{score.task}": score.score for score in scores}
        file.scalars(points | {f"average/{name}": value for name, value in averages(scores).items()}, 0)
        file.close()

    def _where(self, scores: Sequence[TaskScore]) -> str:
        lines = [f"model          {self.root / score.task / 'model'}" for score in scores]
        if self.config.task.predict:
            lines.append(f"predictions    {self.root / 'predictions'}")
        return "\n".join([*lines, f"tensorboard    tensorboard --logdir {self.root}"])

    def _say(self, text: str) -> None:
        if self.runtime.is_rank_zero:
            print(text, flush=True)
