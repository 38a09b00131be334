"""Losses of attention, head by head: MSE of scores (TinyBERT, arXiv 1909.10351), KL of probabilities (MiniLM, arXiv
2002.10957)."""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import UserError
from engine.kernels.inputs import Attention
from engine.losses.base import AttentionMapped, Evaluated, LossSetup, Pair, StepInputs, Target

TARGET = "attention_target"
"""Name of what is observed: the mean of the teacher's squared scores. With the loss it gives rho = |A_s - A_t| /
|A_t|."""


def check_equal_heads(loss: str, setup: LossSetup) -> None:
    """Raises UserError for other numbers of heads: maps of attention can be compared head by head only."""
    if setup.student.heads != setup.teacher.heads:
        raise UserError(
            f"loss.{loss}={getattr(setup.config, loss):g} compares attention head by head, but the student has "
            f"{setup.student.heads} heads and the teacher {setup.teacher.heads}: set "
            f"student.heads={setup.teacher.heads}, or write loss.{loss}=0 and use loss.relation, which accepts any "
            "number of heads"
        )


class HeadByHead(AttentionMapped):
    """A loss on the attention maps of each pair of layers."""

    def check(self) -> None:
        super().check()
        check_equal_heads(self.name, self.setup)

    def attention(self, inputs: StepInputs, pair: Pair) -> Attention:
        """Returns what both layers compute their attention from."""
        windows = self.setup.student.window(pair.student), self.setup.teacher.window(pair.teacher)
        return inputs.attention(self.name, pair)._replace(window_s=windows[0], window_t=windows[1])


class AttentionScoreLoss(HeadByHead):
    """MSE of attention scores before softmax (TinyBERT, arXiv 1909.10351)."""

    name = "attention"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"loss.attention compares scaling * Q K^T; beside it the scores of the {side} ({own.model_type}) have "
            f"{own.added}, which it leaves out"
            for side, own in self.setup.own_attention.items()
            if own.added
        )

    @property
    def targets(self) -> dict[str, Target]:
        return {f"{self.name}/{pair}": Target("scores", pair.teacher) for pair in self.pairs}

    @property
    def observed(self) -> dict[str, str]:
        return {f"{TARGET}/{pair}": f"{self.name}/{pair}" for pair in self.pairs}

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values, targets = {}, {}
        tinybert, counts = self.setup.counts_pads, inputs.per_micro
        for pair in self.pairs:
            tensors = self.attention(inputs, pair)
            values[f"{self.name}/{pair}"], targets[f"{TARGET}/{pair}"] = inputs.kernels.attention_score_mse(
                tensors,
                pairs=counts.position_pairs if tinybert else counts.pairs(tensors.window),
                tinybert=tinybert,
            )
        return Evaluated.weighted(values, weights)._replace(observed=targets)


class AttentionProbsLoss(HeadByHead):
    """KL of attention probabilities (MiniLM, arXiv 2002.10957), always over real tokens."""

    name = "attention_probs"

    def check(self) -> None:
        super().check()
        for side, own in self.setup.own_attention.items():
            if own.added:
                raise UserError(
                    f"loss.attention_probs={self.setup.config.attention_probs:g} compares softmax(scaling * Q K^T), "
                    f"but the scores of the {side} ({own.model_type}) also have {own.added}; set it to 0, and use "
                    "loss.relation, which no score takes part in"
                )

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        values = {
            f"{self.name}/{pair}": inputs.kernels.softmax_kl(
                self.attention(inputs, pair), tokens=inputs.per_micro.tokens
            )
            for pair in self.pairs
        }
        return Evaluated.weighted(values, weights)
