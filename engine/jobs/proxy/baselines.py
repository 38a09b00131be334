"""What students are measured against: the teacher, and the student before its first step. Scored as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from engine.data.batch import Batch
from engine.jobs.distill.build import initial_student
from engine.jobs.distill.plan import Plan
from engine.models import hub
from engine.models.capture import hidden_states, install


@dataclass
class Untrained:
    """A model that an evaluator scores as it does a student."""

    model: PreTrainedModel
    layers: int
    seed: int

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        return hidden_states(self.model, batch, layers)

    def save(self, folder: Path) -> None:
        if torch.distributed.get_rank() == 0:
            self.model.save_pretrained(folder)
        torch.distributed.barrier()


def baselines(plan: Plan, device: torch.device) -> Iterator[tuple[str, Untrained]]:
    """`start` (the student of the uniform mapping) and `teacher`, in the precision that a proxy runs them in; each is
    let go before the next is loaded."""
    start = initial_student(plan, with_mlm_head=False)
    start.to(device=device, dtype=getattr(torch, plan.execution.precision))  # type: ignore[arg-type]
    yield "start", Untrained(start.eval(), plan.student_shape.layers, plan.config.seed)
    del start
    teacher = hub.load_backbone(
        plan.config.teacher.path,
        key="teacher.path",
        config=plan.teacher_config,
        dtype=getattr(torch, plan.teacher_dtype),
    )
    install(teacher, plan.teacher_attention.name)
    teacher.to(device)  # type: ignore[arg-type]
    yield "teacher", Untrained(teacher.eval(), plan.teacher_shape.layers, plan.config.seed)
