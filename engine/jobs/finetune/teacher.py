"""The teacher of a task in a fine-tuning: what of it the losses need, worked out before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from engine.config.finetune import FinetuneConfig
from engine.errors import UserError
from engine.jobs.execution import attention_backend, compute_device
from engine.kernels.choice import choose_kernels
from engine.losses.loss_set import LossSet
from engine.losses.random_layers import build_losses
from engine.mapping import LayerMapping, MappingPair
from engine.models.attention import Backend
from engine.models.hub import AUTO_CLASSES, SavedModel, has_head, shape_of
from engine.tasks.load import TaskData
from engine.tasks.model import head_of, model_folder, require_head


@dataclass(frozen=True)
class TaskTeacher:
    """A teacher of one task, and what of it the losses need."""

    saved: SavedModel
    backend: Backend
    dtype: str
    losses: LossSet | None
    """Layer-mapped losses and that of the embeddings; None when they are off."""
    maps: dict[str, LayerMapping]
    """Layer mappings, by `hidden` and `attention`; empty when these losses are off."""
    warnings: tuple[str, ...]


def read_teachers(config: FinetuneConfig, names: Sequence[str]) -> dict[str, SavedModel]:
    """Reads the configuration of each task's teacher; returns them by task. Raises UserError."""
    return {name: SavedModel.read("teacher.path", path) for name, path in _paths(config, names)}


def _paths(config: FinetuneConfig, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    if config.teacher.path is None:
        return
    if len(names) > 1 and "{task}" not in config.teacher.path:
        raise UserError(
            f"teacher.path={config.teacher.path!r}: one teacher cannot know {len(names)} tasks; write {{task}} in it, "
            "as in runs/teacher/{task}/model, or name one task"
        )
    for name in names:
        yield name, model_folder(config.teacher.path.replace("{task}", name), key="teacher.path")


def plan_teacher(
    config: FinetuneConfig, data: TaskData, model: SavedModel, teacher: SavedModel, seq_len: int, precision: str
) -> TaskTeacher:
    """Works out losses and attention of a task's teacher. Raises UserError for one that cannot teach it."""
    remarks = require_head(teacher.path, key=teacher.key, config=teacher.config, spec=data.spec)
    head = head_of(data.spec)
    if not has_head(teacher.path, key=teacher.key, config=teacher.config, head=head):
        raise UserError(f"{teacher}: its file lacks weights of {AUTO_CLASSES[head][1]}")
    dtype = precision if config.teacher.dtype == "auto" else config.teacher.dtype
    losses, maps = _mapped_losses(config, model, teacher, seq_len, precisions=(precision, dtype))
    if losses is None and config.loss.logits == 0:
        raise UserError("teacher.path is set, but every loss towards the teacher is 0; set loss.logits or remove it")
    shape = shape_of(teacher.config, has_mlm_head=False)
    backend = attention_backend(config.teacher.attention, dtype, shape, seq_len, key="teacher.attention")
    return TaskTeacher(teacher, backend, dtype, losses, maps, (*remarks, *(losses.warnings if losses else ())))


def _mapped_losses(
    config: FinetuneConfig, model: SavedModel, teacher: SavedModel, seq_len: int, precisions: tuple[str, str]
) -> tuple[LossSet | None, dict[str, LayerMapping]]:
    """Returns the layer-mapped losses and their mappings; none where these losses are off."""
    mapped = replace(config.loss, logits=0.0, temperature=1.0)  # these two are TaskModule's
    if not mapped.active:
        return None, {}
    shapes = [shape_of(saved.config, has_mlm_head=False) for saved in (model, teacher)]
    pair = MappingPair.from_texts(
        config.mapping.hidden,
        config.mapping.attention,
        student_layers=shapes[0].layers,
        teacher_layers=shapes[1].layers,
    )
    kernels = choose_kernels(
        config.kernels, device=compute_device(), seq_len=seq_len, tinybert=False, precisions=precisions
    )
    losses = build_losses(
        mapped,
        config.mapping,
        pair,
        student=shapes[0],
        teacher=shapes[1],
        mlm_probability=0.0,
        kernels=kernels,
    )
    return losses, {"hidden": pair.hidden, "attention": pair.attention}
