"""Cross-entropy of the student's MLM logits with the original tokens at masked positions (BERT, arXiv 1810.04805)."""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.kernels import reference
from engine.losses.base import Loss, Side, StepInputs
from engine.models.features import Wanted


class MlmLoss(Loss):
    name = "mlm"

    def check(self) -> None:
        weight = self.setup.config.mlm
        if self.setup.mlm_probability == 0:
            raise UserError(
                f"loss.mlm={weight:g} needs masked tokens, but data.mlm_probability=0: set data.mlm_probability=0.15, "
                "or write loss.mlm=0"
            )
        if not self.setup.student.has_mlm_head:
            raise UserError(
                f"loss.mlm={weight:g} needs an MLM head, but there is none on the student: choose a model with one, "
                "or write loss.mlm=0"
            )

    @property
    def shares(self) -> dict[str, float]:
        return {self.name: 1.0}

    def wanted(self, side: Side) -> Wanted:
        return Wanted(logits=side == "student")

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        logits = inputs.logits(self.name, "student", inputs.batch.counts.masked)
        if inputs.batch.labels is None:
            raise RuntimeError(f"loss.{self.name} needs the batch's labels, but it has none")
        labels = inputs.batch.labels.flatten()
        # Labelled positions first, in their order: labels[labels != -100] would wait for the device to count them.
        first = torch.argsort((labels == reference.IGNORED_LABEL).int(), stable=True)[: len(logits)]
        return {self.name: reference.mlm_cross_entropy(logits, labels[first], count=inputs.per_micro.masked)}
