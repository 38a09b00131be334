"""Losses on the MLM logits: KL at a temperature (at masked positions; without masking at all real ones), and the
student's cross-entropy with the original tokens at masked positions (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.errors import UserError
from engine.kernels.inputs import UNSCORED_LABEL, Head, MlmLogits, Weights
from engine.losses.base import Evaluated, Loss, Side, StepInputs
from engine.models.features import Wanted

KL, CROSS_ENTROPY = "logits", "mlm"


class VocabularyLosses(Loss):
    """Both of them in one pass over the student's logits; one object serves both names."""

    name = KL

    @property
    def shares(self) -> dict[str, float]:
        return {name: 1.0 for name in (KL, CROSS_ENTROPY) if name in self.setup.config.active}

    def check(self) -> None:
        if KL in self.shares:
            self._check_logits()
        if CROSS_ENTROPY in self.shares:
            self._check_mlm()

    def _check_logits(self) -> None:
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

    def _check_mlm(self) -> None:
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

    def wanted(self, side: Side) -> Wanted:
        return Wanted(logits=side == "student" or KL in self.shares)

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        masking = self.setup.mlm_probability > 0
        counts, per_micro = inputs.batch.counts, inputs.per_micro
        rows = counts.masked if masking else counts.tokens
        student = inputs.mlm_head(self._first, "student", rows)
        teacher = inputs.mlm_head(KL, "teacher", rows)(lambda head: head) if KL in self.shares else None
        weighting = Weights(
            kl=weights.get(KL, 0.0),
            cross_entropy=weights.get(CROSS_ENTROPY, 0.0),
            temperature=self.setup.config.temperature,
            count=per_micro.masked if masking else per_micro.tokens,
        )
        labels = self._labels(inputs, int(rows)) if CROSS_ENTROPY in self.shares else None

        def losses(head: Head | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return inputs.kernels.vocabulary_losses(MlmLogits(head, teacher, labels, weighting))

        total, values = student(losses)
        return Evaluated(total, {name: values[(KL, CROSS_ENTROPY).index(name)] for name in self.shares})

    @property
    def _first(self) -> str:
        return next(iter(self.shares))

    @staticmethod
    def _labels(inputs: StepInputs, rows: int) -> torch.Tensor:
        """Returns (rows,), in the order of the logits."""
        if inputs.batch.labels is None:
            raise RuntimeError(f"loss.{CROSS_ENTROPY} needs the batch's labels, but it has none")
        labels = inputs.batch.labels.flatten()
        # Labelled positions first, in their order: labels[labels != UNSCORED_LABEL] would wait for the device to count
        # them.
        return labels[torch.argsort((labels == UNSCORED_LABEL).int(), stable=True)[:rows]]
