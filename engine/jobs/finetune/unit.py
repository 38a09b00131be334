"""One fine-tuning of a job: its run directory, its resume, its export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config.identity import describe_changes
from engine.errors import UserError
from engine.jobs.execution import hardware, versions
from engine.jobs.finetune.plan import FinetunePlan, Unit, unit_identity
from engine.jobs.finetune.scores import UnitScore
from engine.models.projections import Projections
from engine.models.shape import forward_flops_per_token
from engine.models.student import enable_activation_checkpointing
from engine.models.teacher import FrozenTeacher
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime, StopRequest
from engine.records.records import OnRecord, final_result, read_records
from engine.records.run_dir import RunDir, as_yaml, step_tag
from engine.tasks.encode import EncodedTask
from engine.tasks.model import head_of, load_task_model
from engine.tasks.module import TaskModule
from engine.tasks.train import Checkpoints, Recipe, TaskResult, train_on_task
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.checkpoint_storage import SharedFolder
from engine.train.export import export_checkpoint
from engine.train.monitor import Monitor
from engine.train.portable import base_model_of, licences_of, public_name
from engine.train.trainer import Outcome


@dataclass(frozen=True)
class Earlier:
    """Remains of a unit from an earlier start."""

    result: dict[str, Any] | None
    """`result` record, when the unit was finished."""
    chosen: Chosen | None
    """Checkpoint to continue from, when it was not."""


def look_back(plan: FinetunePlan, unit: Unit, runtime: Runtime) -> Earlier:
    """Returns what an earlier start left of a unit. Raises UserError when that was computed differently, or must not be
    there (resume=never). Collective."""
    checkpointer = _checkpointer(plan, unit, runtime)
    result = from_rank_zero(lambda: _earlier_result(plan, unit, checkpointer))
    if result is not None or plan.config.resume == "never":
        return Earlier(result, None)
    return Earlier(None, checkpointer.choose("auto", set_aside=not plan.config.dry_run))


def _earlier_result(plan: FinetunePlan, unit: Unit, checkpointer: Checkpointer) -> dict[str, Any] | None:
    run_dir = RunDir(unit.folder)
    records = read_records(run_dir.records) if run_dir.records.is_file() else []
    if plan.config.resume == "never":
        if records or run_dir.complete_tags():
            raise UserError(
                f"resume='never', but {unit.folder} holds a fine-tuning; name another output_dir, remove that folder, "
                "or write resume=auto"
            )
        return None
    result = final_result(records)
    if result is None:
        return None
    changes = describe_changes(result["identity"], checkpointer.identity)
    if changes:
        raise UserError(
            f"{unit.folder} holds a fine-tuning that was computed differently ({'; '.join(changes)}). Restore these "
            "values, name another output_dir, or remove that folder"
        )
    return result


def _checkpointer(plan: FinetunePlan, unit: Unit, runtime: Runtime) -> Checkpointer:
    return Checkpointer(
        run_dir=RunDir(unit.folder),
        execution=plan.executions[unit.at.batch],
        runtime=runtime,
        identity=unit_identity(plan, unit),
        keep=1,
        storage=SharedFolder(runtime),
    )


def score_of(unit: Unit, result: dict[str, Any]) -> UnitScore:
    """Returns what a unit's `result` record says of its score."""
    return UnitScore(
        point=unit.at.point,
        seed=unit.seed,
        score=result["score"],
        metrics=result["metrics"],
        steps=result["steps_run"],
        samples=result["samples"],
        seconds=result["seconds"],
    )


def task_module(plan: FinetunePlan, unit: Unit) -> TaskModule:
    """Returns the module with its initial weights, which depend on the model and the unit's seed alone."""
    config, teacher = plan.config, unit.task.teacher
    spec = unit.task.data.spec
    student = load_task_model(
        plan.model.path,
        key="model.path",
        spec=spec,
        dropout=config.task.dropout,
        seed=unit.seed,
        backend=unit.task.backend.name,
    )
    if config.model.activation_checkpointing:
        enable_activation_checkpointing(student)
    projections = None
    if teacher is not None and teacher.losses is not None:
        torch.manual_seed(unit.seed + 1)
        projections = Projections(
            config.loss,
            student_width=plan.shape.width,
            teacher_width=teacher.saved.config.hidden_size,
            layers=teacher.losses.projected_layers,
        )
    return TaskModule(
        student,
        kind=spec.kind,
        loss=config.loss,
        with_teacher=teacher is not None,
        losses=None if teacher is None else teacher.losses,
        projections=projections,
        unpadded=config.kernels.unpadded,
    )


class UnitRun:
    """One start of a unit on this rank."""

    def __init__(
        self,
        plan: FinetunePlan,
        unit: Unit,
        chosen: Chosen | None,
        *,
        runtime: Runtime,
        stop: StopRequest,
        on_record: OnRecord | None = None,
    ) -> None:
        """on_record: is called with each record, which has the unit's name."""
        self._on_record = on_record
        self.plan, self.unit, self.chosen = plan, unit, chosen
        self.tag = None if chosen is None else chosen.tag
        self.runtime, self.stop = runtime, stop
        self.run_dir = RunDir(unit.folder)
        self.execution = plan.executions[unit.at.batch]
        self.unit_config = plan.unit_config(unit)

    def run(self, task: EncodedTask, teacher: FrozenTeacher | None) -> dict[str, Any] | None:
        """Trains, and returns the result record (with `score` None after a divergence), or None when it was preempted.
        Collective."""
        plan, unit = self.plan, self.unit
        checkpointer = _checkpointer(plan, unit, self.runtime)
        from_rank_zero(lambda: self._begin_folder(checkpointer))
        module = task_module(plan, unit)
        train = plan.train_config(unit, len(task.train))
        monitor = Monitor(
            active=self.runtime.is_rank_zero,
            tensorboard=self.run_dir.tensorboard,
            records=self.run_dir.records,
            steps=train.steps,
            flops_per_token=self._flops_per_token(module, teacher, task),
            device=self.runtime.device,
            config_text=as_yaml(self.unit_config),
            trackers=self.execution.trackers,
            on_record=None if self._on_record is None else self._pass_on,
        )
        checkpointer.export.update(self._description(module))
        monitor.write_record("run", status="started", step=0, resumed_from=self.tag, steps=train.steps, **self._facts())
        try:
            recipe = Recipe(
                train=train,
                optim=plan.config.optim,
                execution=self.execution,
                seed=unit.seed,
                eval_every=plan.config.task.eval_every,
                patience=plan.config.task.patience,
                require_fused=plan.config.require_fused,
            )
            result = train_on_task(
                module,
                task,
                recipe,
                runtime=self.runtime,
                stop=self.stop,
                monitor=monitor,
                checkpoints=Checkpoints(checkpointer, self.chosen),
                teacher=teacher,
            )
            monitor.end_progress()
            if result.outcome is Outcome.PREEMPTED:
                monitor.write_record("run", status="preempted", step=result.step, signal=self.stop.signal)
                return None
            return self._finish(result, monitor, checkpointer.identity, train.global_batch)
        finally:
            monitor.close()

    def _begin_folder(self, checkpointer: Checkpointer) -> None:
        """Puts what earlier starts left out of the way, and writes the settings. For rank 0."""
        for note in () if self.chosen is None else self.chosen.notes:
            print(note)
        for name in checkpointer.clean():
            print(f"removed {name}: an unfinished checkpoint")
        for old, new in self.run_dir.set_aside_logs() if self.tag is None else ():
            print(f"renamed {old} to {new.name}: this fine-tuning starts anew")
        self.run_dir.write_settings(self.unit_config, ds_config=self.execution.resolved, tokenizer=self.plan.tokenizer)

    def _pass_on(self, record: dict[str, Any]) -> None:
        assert self._on_record is not None
        self._on_record({"unit": self.unit.name, **record})

    def _flops_per_token(self, module: TaskModule, teacher: FrozenTeacher | None, task: EncodedTask) -> float:
        """Returns the FLOPs of training for a token as TFLOPS_NOTE of engine/train/monitor.py defines them, at the mean
        length of a row. A head on the first token (and the pooler) runs once a row."""
        length, student = task.mean_tokens, module.student
        share = 1.0 if task.spec.kind == "span" else 1 / length
        forward = forward_flops_per_token(student, self.plan.shape, round(length), head_share=share)
        pooler = getattr(student.base_model, "pooler", None)
        if isinstance(pooler, nn.Module):
            forward -= (1 - 1 / length) * 2.0 * sum(p.numel() for p in pooler.parameters() if p.ndim == 2)
        of_teacher = 0.0 if teacher is None else teacher.flops_per_token(round(length), head_share=share)
        projections = 2.0 * sum(p.numel() for p in module.projections.parameters())
        return of_teacher + 3.0 * (forward + projections)

    def _hparams(self) -> dict[str, float | str]:
        at, task = self.unit.at, self.unit.task.name
        return {"task": task, "lr": at.lr, "batch": at.batch, "epochs": at.epochs, "seed": self.unit.seed}

    def _facts(self) -> dict[str, Any]:
        return {**self._hparams(), **self.execution.facts}

    def _description(self, module: TaskModule) -> dict[str, Any]:
        """Returns what a checkpoint tells launch/export.py."""
        unit, config = self.unit, self.plan.config
        spec, student = unit.task.data.spec, module.student
        teacher = unit.task.teacher
        licences = licences_of(self.plan.model.path)
        card = {
            "task": spec.name,
            "fine-tuned from": public_name(config.model.path),
            "its licence": ", ".join(licences) or "not named in its card",
            "training rows": f"{unit.task.train_rows:,}",
            "epochs, learning rate, batch": f"{unit.at.epochs:g}, {unit.at.lr:g}, {unit.at.batch}",
            "longest input": f"{unit.task.seq_len} tokens",
            "seed": unit.seed,
            "hardware": hardware(self.execution),
            "libraries": versions(),
        }
        if teacher is not None:
            card["teacher"] = public_name(teacher.saved.path)
        return {
            "student_config": student.config.to_dict(),
            "head": head_of(spec),
            "pairs": spec.pair,
            "base_model": base_model_of(config.model.path),
            "licences": licences,
            "card": card,
        }

    def _finish(self, result: TaskResult, monitor: Monitor, identity: dict[str, Any], batch: int) -> dict[str, Any]:
        """Exports, writes the result, removes the checkpoints (rank 0)."""
        history = monitor.history
        seconds = sum(record["seconds"] for record in history.steps.values())
        timed = sum(record["samples_per_s"] * record["seconds"] for record in history.steps.values())
        fields = {
            "status": result.outcome.value,
            "score": result.score,
            "metrics": result.metrics,
            "step": result.step,
            "steps_run": result.steps_run,
            "samples": timed,
            "seconds": seconds,
            "samples_per_s": timed / seconds if seconds else None,
            "optimizer": result.optimizer,
            "identity": identity,
            **self._facts(),
        }
        if not self.runtime.is_rank_zero:
            return fields
        if result.score is not None:
            scores = {name: f"{value:.4f}" for name, value in {"dev score": result.score, **result.metrics}.items()}
            export_checkpoint(self.run_dir, step_tag(result.step), self.run_dir.model, scores=scores)
            fields["model"] = str(self.run_dir.model)
            models = {"student": self.plan.config.model.path, "teacher": self.plan.config.teacher.path}
            names = {role: public_name(path) for role, path in models.items() if path is not None}
            monitor.write_hparams({**names, **self._hparams()}, {"score": result.score})
        monitor.write_record("result", **fields)
        remove_checkpoints(self.run_dir)
        return fields


def remove_checkpoints(run_dir: RunDir) -> None:
    """Removes the checkpoints of a unit whose result is written."""
    shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
    shutil.rmtree(run_dir.tokenizer, ignore_errors=True)  # the model's folder has it
