"""MSE of attention scores before softmax (TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.kernels import attention_score, reference
from engine.losses.base import AttentionMapped, LossSetup, StepInputs


def check_equal_heads(loss: str, setup: LossSetup) -> None:
    """Maps of attention can be compared head by head only."""
    if setup.student.heads != setup.teacher.heads:
        raise UserError(
            f"loss.{loss}={getattr(setup.config, loss):g} compares attention head by head, but the student has "
            f"{setup.student.heads} heads and the teacher {setup.teacher.heads}: set "
            f"student.heads={setup.teacher.heads}, or write loss.{loss}=0 and use loss.relation, which accepts any "
            "number of heads"
        )


class AttentionScoreLoss(AttentionMapped):
    name = "attention"

    def check(self) -> None:
        check_equal_heads(self.name, self.setup)

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        terms = {}
        mask, counts = inputs.batch.token_mask, inputs.per_micro
        for pair in self.pairs:
            tensors, scale_s, scale_t = inputs.attention(self.name, pair)
            if self.setup.counts_pads:
                value = reference.attention_score_mse_tinybert(
                    *tensors, scale_s=scale_s, scale_t=scale_t, mask=mask, position_pairs=counts.position_pairs
                )
            else:
                value = attention_score.attention_score_mse(
                    *tensors, scale_s=scale_s, scale_t=scale_t, mask=mask, token_pairs=counts.token_pairs
                )
            terms[f"{self.name}/{pair}"] = value
        return terms
