"""KL of the MLM logits at a temperature, at the masked positions (without masking: at all real positions)."""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.kernels import reference
from engine.losses.base import Loss, Side, StepInputs
from engine.models.features import Wanted


class LogitsLoss(Loss):
    name = "logits"

    def check(self) -> None:
        weight, student, teacher = self.setup.config.logits, self.setup.student, self.setup.teacher
        without = [name for name, shape in (("student", student), ("teacher", teacher)) if not shape.has_mlm_head]
        if without:
            raise UserError(
                f"loss.logits={weight:g} needs an MLM head on both sides, but there is none on the "
                f"{' and the '.join(without)}: choose models with one, or write loss.logits=0"
            )
        if student.vocab != teacher.vocab:
            raise UserError(
                f"loss.logits={weight:g} needs one vocabulary, but the student has {student.vocab} tokens and the "
                f"teacher {teacher.vocab}: use the teacher's tokenizer for the student, or write loss.logits=0"
            )

    @property
    def shares(self) -> dict[str, float]:
        return {self.name: 1.0}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(logits=True)

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        masking = self.setup.mlm_probability > 0
        rows = inputs.batch.counts.masked if masking else inputs.batch.counts.tokens
        value = reference.logits_kl(
            inputs.logits(self.name, "student", rows),
            inputs.logits(self.name, "teacher", rows),
            temperature=self.setup.config.temperature,
            count=inputs.per_micro.masked if masking else inputs.per_micro.tokens,
        )
        return {self.name: value}
