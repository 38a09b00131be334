"""The models that students are measured against: the teacher, and the student before its first step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.data.batch import Batch
from engine.hub.files import quiet
from engine.jobs.distill.build import initial_student, load_teacher
from engine.jobs.distill.plan import Plan
from engine.models.capture import hidden_states, padded_states
from engine.models.features import Wanted
from engine.models.hub import load_backbone
from engine.models.teacher import FrozenTeacher


@dataclass
class Start:
    """Student of the uniform mapping as it is initialised."""

    model: PreTrainedModel
    layers: int
    seed: int

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """Returns the hidden states of these layers (0: embeddings) in their order, (B, L, D) each."""
        return hidden_states(self.model, batch, layers)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder. Collective."""
        _save(self.model, folder)


class Teacher:
    """Teacher, placed as in training (teacher.placement), and loaded when it is first asked."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self.layers, self.seed = plan.teacher_shape.layers, plan.config.seed

    @functools.cached_property
    def _frozen(self) -> FrozenTeacher:
        return load_teacher(self._plan, Wanted(hidden=frozenset(range(self.layers + 1))), self._device)

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """Returns the hidden states of these layers (0: embeddings) in their order, (B, L, D) each."""
        return padded_states(self._frozen(batch), layers)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder. Collective."""
        teacher = self._plan.teacher
        _save(load_backbone(teacher.path, key=teacher.key, config=teacher.config), folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        with quiet():
            model.save_pretrained(folder)
    torch.distributed.barrier()


def baselines(plan: Plan, device: torch.device) -> Iterator[tuple[str, Start | Teacher]]:
    """Yields `start` and `teacher`, in the precision that a proxy runs them in; each is let go before the next is
    loaded."""
    model = initial_student(plan, with_mlm_head=False)
    nn.Module.to(model, device=device, dtype=getattr(torch, plan.execution.precision))
    yield "start", Start(model.eval(), plan.student_shape.layers, plan.config.seed)
    del model
    yield "teacher", Teacher(plan, device)
