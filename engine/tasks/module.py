"""The module that fine-tuning trains: task model, the task's loss and those towards a teacher inside `forward`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from engine.config.finetune import TaskLossConfig
from engine.data.batch import Counts, TaskBatch
from engine.errors import UserError
from engine.losses.loss_set import LossSet
from engine.models.capture import capture, inputs_of, segments_of, task_logits
from engine.models.features import Features, Wanted
from engine.models.install import runs_unpadded
from engine.models.projections import Projections
from engine.models.unpadding import packing
from engine.tasks.specs import Kind


class TaskModule(nn.Module):
    """A student with its task head and its losses. Submodules are named as DistilModule's, so that checkpoints and
    exports work alike."""

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        kind: Kind,
        loss: TaskLossConfig | None = None,
        with_teacher: bool = False,
        losses: LossSet | None = None,
        projections: Projections | None = None,
        unpadded: bool = False,
    ) -> None:
        """student: of load_task_model. loss: unset: the task's own loss only. with_teacher: whether `forward` gets the
        teacher's task logits. losses: the layer-mapped ones (they need `with_teacher` and `projections`), or None.
        unpadded: run padded batches without their pads, where the student can."""
        super().__init__()
        assert losses is None or (with_teacher and projections is not None)
        loss = loss or TaskLossConfig()
        self.student = student
        self.projections: nn.Module = projections if projections is not None else nn.ModuleDict()
        self._kind, self.losses, self._temperature = kind, losses, loss.temperature
        self._unpadded = unpadded and runs_unpadded(student)
        weights = {"labels": loss.labels, "logits": loss.logits if with_teacher else 0.0}
        self._own = {name: weight for name, weight in weights.items() if weight > 0}
        if not self._own:  # the head would get no gradient
            raise UserError("loss.labels=0.0: must be > 0 unless a teacher's loss.logits trains the head")
        mapped = () if losses is None else losses.term_names
        self.term_names: tuple[str, ...] = (*self._own, *mapped)
        self.observed_names: tuple[str, ...] = () if losses is None else losses.observed_names
        self.coefficients: tuple[float, ...] = (*self._own.values(), *(losses.coefficients if losses else ()))

    def forward(
        self, batch: TaskBatch, teacher: Features | None = None, per_micro: Counts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Returns the total (scalar, differentiable) and the value of every term (T,), in its scale, detached, both
        fp32, normalised by `per_micro` as in DistilModule.forward. Without `per_micro`: the fp32 task logits alone ((B,
        labels), (B, 1) of a regression, (B, L, 2) of a span, where padded tokens may have any value)."""
        if per_micro is None:
            return self._logits(batch)
        features = self._features(batch)
        values = self._own_losses(features, teacher, batch, per_micro)
        total = torch.stack([weight * value for weight, value in zip(self._own.values(), values, strict=True)]).sum()
        terms = torch.stack(values).detach()
        if self.losses is None:
            return total, terms
        assert teacher is not None
        mapped, mapped_terms = self.losses(features, teacher, batch, per_micro, self.projections)  # type: ignore[arg-type]
        return total + mapped, torch.cat([terms, mapped_terms])

    def _features(self, batch: TaskBatch) -> Features:
        if self.losses is None:
            return Features(task_logits=self._logits(batch))
        student: Any = self.student
        wanted = self.losses.wanted_student | Wanted(task_logits=True)
        return capture(student, batch, wanted, unpadded=self._unpadded)

    def _own_losses(
        self, features: Features, teacher: Features | None, batch: TaskBatch, per_micro: Counts
    ) -> list[torch.Tensor]:
        assert features.task_logits is not None
        logits = features.task_logits.float()
        values = []
        if "labels" in self._own:
            values.append(labels_loss(logits, batch, self._kind) / per_micro.sequences)
        if "logits" in self._own:
            assert teacher is not None, "loss.logits needs a teacher"
            assert teacher.task_logits is not None, "loss.logits needs the teacher's task logits"
            kd = logits_loss(logits, teacher.task_logits.float(), batch, self._kind, self._temperature)
            values.append(kd / per_micro.sequences)
        return values

    def _logits(self, batch: TaskBatch) -> torch.Tensor:
        with packing(segments_of(batch) if self._unpadded else None, pad_at_end=True):
            return task_logits(self.student(**inputs_of(batch), return_dict=True)).float()


def teacher_wanted(loss: TaskLossConfig, losses: LossSet | None) -> Wanted:
    """Returns what a TaskModule with these losses needs of the teacher."""
    mapped = Wanted() if losses is None else losses.wanted_teacher
    return mapped | Wanted(task_logits=loss.logits > 0)


def labels_loss(logits: torch.Tensor, batch: TaskBatch, kind: Kind) -> torch.Tensor:
    """Returns the task's own loss, summed over the rows (scalar): cross-entropy of the labels, mean of the
    cross-entropies of both ends of a span over the real tokens, or squared error of a regression. logits: as
    TaskModule.forward's."""
    assert batch.targets is not None, "training rows have labels"
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), batch.targets.to(logits.dtype), reduction="sum")
    if kind == "classification":
        return F.cross_entropy(logits, batch.targets, reduction="sum")
    ends = _end_logits(logits, batch)
    return F.cross_entropy(ends, batch.targets.flatten(), reduction="sum") / 2


def logits_loss(
    student: torch.Tensor, teacher: torch.Tensor, batch: TaskBatch, kind: Kind, temperature: float
) -> torch.Tensor:
    """Returns KL(teacher || student) of the softmax at the temperature T, times T squared (Hinton et al. 2015: so that
    its gradient does not shrink with T), summed over the rows (scalar); of a span the mean over both ends; of a
    regression the squared error."""
    if kind == "regression":
        return F.mse_loss(student, teacher, reduction="sum")
    ends = 1
    if kind == "span":
        student, teacher, ends = _end_logits(student, batch), _end_logits(teacher, batch), 2
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher / temperature, dim=-1)
    gap = (log_t - log_s).masked_fill(torch.isinf(log_t), 0.0)  # pads: both are -inf, and weigh nothing
    return (log_t.exp() * gap).sum() * temperature**2 / ends


def _end_logits(logits: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
    """Returns (2 B, L) of (B, L, 2): start and end of each row, -inf at pads."""
    mask = batch.token_mask
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    return logits.transpose(1, 2).flatten(0, 1)
