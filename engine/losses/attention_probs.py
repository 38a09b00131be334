"""KL of attention probabilities (MiniLM, arXiv 2002.10957), always over real tokens."""

from __future__ import annotations

from collections.abc import Mapping

from engine.losses.attention import check_equal_heads
from engine.losses.base import AttentionMapped, Evaluated, StepInputs


class AttentionProbsLoss(AttentionMapped):
    name = "attention_probs"

    def check(self) -> None:
        check_equal_heads(self.name, self.setup)

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values = {
            f"{self.name}/{pair}": inputs.kernels.softmax_kl(
                inputs.attention(self.name, pair), inputs.rows, tokens=inputs.per_micro.tokens
            )
            for pair in self.pairs
        }
        return Evaluated.weighted(values, weights)
