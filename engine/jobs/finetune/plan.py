"""What a fine-tuning job will do, worked out and checked before any model is loaded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.config.finetune import FinetuneConfig, TaskConfig
from engine.config.marks import FIXED, settings
from engine.errors import UserError
from engine.hub.files import allow_pickle
from engine.jobs.execution import attention_backend, plan_execution
from engine.jobs.finetune.scores import Point
from engine.jobs.finetune.teacher import TaskTeacher, plan_teacher, read_teachers
from engine.models.attention import Backend
from engine.models.fit import Parts, check_fit, longest_input
from engine.models.hub import SavedModel, model_class, model_hashes, shape_of
from engine.models.shape import ModelShape
from engine.records.fingerprints import digest
from engine.tasks.load import TaskData, load_task, resolve_names
from engine.tasks.model import head_remarks, model_folder, task_tokenizer
from engine.tasks.specs import require_trainable, task_spec
from engine.tasks.train import task_train_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POINT_KEYS = ("lr", "batch", "epochs")
"""The grid's keys in the order in which folders and tables name them."""


@dataclass(frozen=True)
class PlannedPoint:
    """One choice of lr, batch and epochs for one task."""

    point: Point
    """Part of it that the grid chose."""
    lr: float
    batch: int
    epochs: float


@dataclass(frozen=True)
class PlannedTask:
    """Data, grid points and teacher of one task."""

    data: TaskData
    rows_sha256: str
    """Hash of the rows that train and score."""
    seq_len: int
    points: tuple[PlannedPoint, ...]
    backend: Backend
    teacher: TaskTeacher | None

    @property
    def name(self) -> str:
        return self.data.spec.name

    @property
    def train_rows(self) -> int:
        """Number of training rows"""
        return len(self.data.splits["train"])


@dataclass(frozen=True)
class Unit:
    """One fine-tuning."""

    task: PlannedTask
    at: PlannedPoint
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Task, values of the grid and seed, as a line names them"""
        values = ", ".join(f"{name} {value:g}" for name, value in self.at.point)
        return f"{self.task.name}{', ' + values if values else ''}, seed {self.seed}"


@dataclass(frozen=True)
class FinetunePlan:
    """Facts and choices of a job that are known before any model is loaded."""

    config: FinetuneConfig
    model: SavedModel
    shape: ModelShape
    tokenizer: PreTrainedTokenizerFast
    tasks: tuple[PlannedTask, ...]
    absent: tuple[str, ...]
    """GLUE tasks that `glue` stands for and that have no files."""
    executions: dict[int, Execution]
    """How each batch is executed, by its rows per optimizer step."""
    model_identity: dict[str, str]
    """Hashes of the model's files, by key."""
    warnings: tuple[str, ...]

    @property
    def units(self) -> list[Unit]:
        """All fine-tunings, in the order in which they run"""
        return [unit for task in self.tasks for unit in self.units_of(task)]

    def units_of(self, task: PlannedTask) -> list[Unit]:
        """Returns the fine-tunings of a task: every point with every seed."""
        root = Path(self.config.output_dir) / task.name
        return [
            Unit(task, at, seed, root.joinpath(*_folder_names(at.point), f"seed-{seed}"))
            for at in task.points
            for seed in self.config.task.seeds
        ]

    def train_config(self, unit: Unit, rows: int) -> TrainConfig:
        """Returns steps, batch and schedule of a fine-tuning. rows: number of training rows, or windows of a span
        task."""
        return task_train_config(
            rows,
            epochs=unit.at.epochs,
            lr=unit.at.lr,
            batch=unit.at.batch,
            warmup_share=self.config.task.warmup_share,
            settings=self.config.train,
        )

    def unit_config(self, unit: Unit) -> FinetuneConfig:
        """Returns the configuration that makes this unit alone."""
        at = unit.at
        task = replace(
            self.config.task,
            name=[unit.task.name],
            seeds=[unit.seed],
            grid={},
            lr=at.lr,
            batch=at.batch,
            epochs=at.epochs,
            seq_len=unit.task.seq_len,
        )
        return replace(self.config, task=task)


def _folder_names(point: Point) -> list[str]:
    return ["-".join(f"{name}{value:g}" for name, value in point)] if point else []


def make_finetune_plan(config: FinetuneConfig) -> FinetunePlan:
    """Reads configuration files, tokenizers and task files, and checks them against each other. Raises UserError."""
    allow_pickle(config.allow_pickle)
    names, absent = resolve_names(config.task.names, config.task)
    model = SavedModel.read("model.path", model_folder(config.model.path, key="model.path"))
    teachers = read_teachers(config, names)
    model_class(model.config, "classification")
    _check_activation_checkpointing(config, model.config)
    executions = _executions(config, names)
    models = (model, *teachers.values())
    tokenizer, warning = task_tokenizer(model.path, model.key, *(saved.config for saved in models))
    length = config.task.seq_len
    notes = check_fit(Parts(tokenizer, models, length=length, length_of=f"task.seq_len={length}"))
    shape = shape_of(model.config, has_mlm_head=False)
    precision = next(iter(executions.values())).precision
    tasks = tuple(_plan_task(name, config, model, teachers.get(name), precision) for name in names)
    warnings = [*([warning] if warning else []), *notes]
    for task in tasks:
        warnings += task.data.warnings
        warnings += head_remarks(model.path, key=model.key, config=model.config, spec=task.data.spec)
        warnings += task.teacher.warnings if task.teacher is not None else ()
    return FinetunePlan(
        config=config,
        model=model,
        shape=shape,
        tokenizer=tokenizer,
        tasks=tasks,
        absent=tuple(absent),
        executions=executions,
        model_identity=model_hashes("model", model),
        warnings=tuple(dict.fromkeys([*warnings, *_idle_settings(config)])),
    )


def _check_activation_checkpointing(config: FinetuneConfig, model_config: PretrainedConfig) -> None:
    kind = model_class(model_config, "classification")
    if config.model.activation_checkpointing and not getattr(kind, "supports_gradient_checkpointing", False):
        raise UserError(
            f"model.activation_checkpointing=True: transformers does not support it for model type "
            f"{model_config.model_type!r}; set it to false"
        )


def _executions(config: FinetuneConfig, names: list[str]) -> dict[int, Execution]:
    """Returns how every batch size is executed. Raises UserError in terms of task.batch."""
    executions: dict[int, Execution] = {}
    for name in names:
        for at in _points(name, config.task):
            train = task_train_config(1, epochs=1, lr=at.lr, batch=at.batch, settings=config.train)
            try:
                executions[at.batch] = plan_execution(config.deepspeed_config, train, config.optim)
            except UserError as error:
                key = "task.grid.batch" if "batch" in config.task.grid else "task.batch"
                raise UserError(str(error).replace("train.global_batch", f"{name}: {key}")) from None
    return executions


def _points(name: str, task: TaskConfig) -> tuple[PlannedPoint, ...]:
    """Returns every combination of the grid, each once, filled up with the settings and the task's defaults."""
    defaults = task_spec(name, task).defaults
    searched = [key for key in POINT_KEYS if key in task.grid]
    points = []
    for values in itertools.product(*(dict.fromkeys(task.grid[key]) for key in searched)):
        point = dict(zip(searched, values, strict=True))
        chosen = {key: point.get(key, getattr(task, key) or getattr(defaults, key)) for key in POINT_KEYS}
        at = PlannedPoint(tuple(point.items()), chosen["lr"], int(chosen["batch"]), chosen["epochs"])
        points.append(at)
    return tuple(points)


def _plan_task(
    name: str,
    config: FinetuneConfig,
    model: SavedModel,
    teacher: SavedModel | None,
    precision: str,
) -> PlannedTask:
    require_trainable(task_spec(name, config.task), "task.name")
    data = load_task(name, config.task)
    sha256 = data.sha256
    if config.task.predict:  # test rows change no score, so they are not in the hash
        data = load_task(name, config.task, test=True)
    if data.spec.kind == "span":
        model_class(model.config, "span")
    seq_len = _seq_len(config, data, [saved.config for saved in (model, teacher) if saved is not None])
    planned = None if teacher is None else plan_teacher(config, data, model, teacher, seq_len, precision)
    shape = shape_of(model.config, has_mlm_head=False)
    backend = attention_backend(config.model.attention, precision, shape, seq_len, key="model.attention")
    return PlannedTask(data, sha256, seq_len, _points(name, config.task), backend, planned)


def _seq_len(config: FinetuneConfig, data: TaskData, models: list[PretrainedConfig]) -> int:
    """Returns the number of tokens that the user asked for, else the task's default, cut to what the models take."""
    limits = [limit for model in models if (limit := longest_input(model)) is not None]
    return min([config.task.seq_len or data.spec.defaults.seq_len, *limits])


def _idle_settings(config: FinetuneConfig) -> list[str]:
    """Returns a sentence for each setting without effect."""
    idle = []
    if config.teacher.path is None:
        for name in ("temperature", "projection", "projection_bias", "average_layers", "relation_heads"):
            if getattr(config.loss, name) != getattr(type(config.loss)(), name):
                idle.append(f"loss.{name} has no effect without teacher.path")
        if config.mapping != type(config.mapping)():
            idle.append("mapping has no effect without teacher.path")
    elif config.loss.temperature != 1.0 and config.loss.logits == 0:
        idle.append("loss.temperature has no effect while loss.logits is 0")
    return idle


def unit_identity(plan: FinetunePlan, unit: Unit) -> dict[str, Any]:
    """Returns what must be the same when a fine-tuning is continued, or its result taken over: settings and hashes."""
    fixed = settings(plan.unit_config(unit), *FIXED)
    teacher = unit.task.teacher
    if unit.task.data.spec.kind != "span":
        del fixed["task.doc_stride"]
    if plan.config.task.patience is None:
        del fixed["task.eval_every"]
    if teacher is None:
        unused = ("teacher.", "mapping.", "loss.")
        fixed = {key: value for key, value in fixed.items() if key == "loss.labels" or not key.startswith(unused)}
    else:
        fixed |= model_hashes("teacher", teacher.saved)
        fixed |= {f"mapping.{key}_resolved": str(layers) for key, layers in teacher.maps.items()}
    return fixed | {
        "task.rows_sha256": unit.task.rows_sha256,
        "tokenizer.sha256": digest([plan.tokenizer.get_vocab(), plan.tokenizer.model_input_names]),
        **plan.model_identity,
    }
