"""KL of attention probabilities (MiniLM, arXiv 2002.10957), always over real tokens."""

from __future__ import annotations

import torch

from engine.kernels import reference
from engine.losses.attention import check_equal_heads
from engine.losses.base import AttentionMapped, StepInputs


class AttentionProbsLoss(AttentionMapped):
    name = "attention_probs"

    def check(self) -> None:
        check_equal_heads(self.name, self.setup)

    def __call__(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        terms = {}
        for pair in self.pairs:
            tensors, scale_s, scale_t = inputs.attention(self.name, pair)
            terms[f"{self.name}/{pair}"] = reference.attention_probs_kl(
                *tensors,
                scale_s=scale_s,
                scale_t=scale_t,
                mask=inputs.batch.token_mask,
                tokens=inputs.per_micro.tokens,
            )
        return terms
