"""The definition of correct: every loss as a pure, differentiable function in plain PyTorch.

Shapes: B sequences of L tokens, H heads of width d, hidden width D, vocabulary V, P chosen positions. Every function
takes the student's tensors before the teacher's, computes in float32 (float64 when an input is float64; never in a
surrounding autocast's precision) and returns a scalar: a SUM over this micro batch divided by a plain number that the
caller gives. With that number = global count / (ranks * accumulation steps), the mean over ranks and micro batches is
the mean over the global batch, however that was split.

`mask` is (B, L) bool, True = real token, or None when all are. Masked tensors are overwritten BEFORE any arithmetic
(0 * NaN is NaN), so whatever stands in the padding reaches neither value nor gradient, and gradients there are 0.

Losses of attention take padded sequences (Attention.padded).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels.inputs import UNSCORED_LABEL, Attention, Rows, check_same_shape, normaliser, relations, repeat_heads

MASKED_SCORE_TINYBERT = -10000.0
"""Number that TinyBERT adds to the scores of padded keys."""
ZEROED_SCORE_TINYBERT = -100.0
"""Score up to which TinyBERT compares every one as 0."""


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalised(total: torch.Tensor, denominator: float, *, empty: bool = False) -> torch.Tensor:
    """Returns total / denominator. A count of 0 is legal only for a sum over nothing, whose value 0 keeps its graph."""
    return total if empty and denominator <= 0 else total / normaliser(denominator)


def without_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns x, (B, L, D) or (B, H, L, d), in full precision, exactly 0 at padded tokens (and so is its gradient)."""
    x = _wide(x)
    if mask is None:
        return x
    real = mask[:, :, None] if x.dim() == 3 else mask[:, None, :, None]
    return x.masked_fill(~real, 0.0)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns scale * Q K^T (B, H, L, L) of (B, H, L, d) and (B, H or fewer, L, d)."""
    # Autocast would multiply float32 matrices in 16 bit (it leaves or widens every other operation in this file).
    with torch.autocast(q.device.type, enabled=False):
        return scale * (q @ repeat_heads(k, q.shape[1]).transpose(-1, -2))


def _both_scores(inputs: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the student's and the teacher's scores (B, H, L, L), 0 at pairs with a pad."""
    check_same_shape("(batch, heads, length)", inputs.q_s.shape[:3], inputs.q_t.shape[:3])
    q_s, k_s, q_t, k_t = (without_padding(x, inputs.rows.mask) for x in inputs[:4])
    return _scores(q_s, k_s, inputs.scale_s), _scores(q_t, k_t, inputs.scale_t)


def outside(window: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns (rows, columns) bool: which pairs of these positions are further apart than the window."""
    return (rows[:, None] - columns[None, :]).abs() > window


def _within(scores: torch.Tensor, window: int | None, value: float) -> torch.Tensor:
    """Returns scores (B, H, L, L) with `value` at the pairs outside of the window."""
    if window is None:
        return scores
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(outside(window, positions, positions), value)


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, tokens: float) -> torch.Tensor:
    """Returns the mean squared error of hidden states (B, L, D): sum over real tokens of |s - t|^2 / (tokens * D).

    TinyBERT (arXiv 1909.10351), with the student already projected to the teacher's width. With
    mask=None and tokens=B*L it is nn.MSELoss, as TinyBERT's released code has it.
    """
    check_same_shape("hidden states", student.shape, teacher.shape)
    difference = without_padding(student, mask) - without_padding(teacher, mask)
    return _normalised(difference.square().sum(), tokens * student.shape[-1])


def hidden_cosine(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, tokens: float
) -> torch.Tensor:
    """Returns 1 - cosine of hidden states (B, L, D): sum over real tokens of 1 - <s, t> / (|s| |t|), divided by tokens.

    DistilBERT's cosine loss (arXiv 1910.01108), here on any layer. Norms are clamped from below at 1e-8.
    """
    check_same_shape("hidden states", student.shape, teacher.shape)
    cosine = F.cosine_similarity(without_padding(student, mask), without_padding(teacher, mask), dim=-1, eps=1e-8)
    distance = 1.0 - cosine
    if mask is not None:
        distance = distance.masked_fill(~mask, 0.0)
    return _normalised(distance.sum(), tokens)


def attention_score_mse(inputs: Attention, *, token_pairs: float) -> torch.Tensor:
    """Returns the MSE of attention scores A = scale * Q K^T, before softmax: sum over heads and pairs (i, j) of real
    tokens of (A_s - A_t)^2 / (H * token_pairs). TinyBERT (arXiv 1909.10351).

    token_pairs: how many pairs both layers attend to; these alone count.
    """
    # A zeroed query or key makes its scores 0 on both sides: no pair mask is needed.
    scores_s, scores_t = _both_scores(inputs)
    difference = _within(scores_s - scores_t, inputs.window, 0.0)
    return _normalised(difference.square().sum(), inputs.q_s.shape[1] * token_pairs)


def attention_score_mse_tinybert(inputs: Attention, *, position_pairs: float) -> torch.Tensor:
    """Returns the MSE of attention scores as in TinyBERT's released general_distill.py: -10000 is added to the scores
    of padded keys, each side's scores <= -100 become 0, and the mean is over all positions, pads included:
    sum / (H * position_pairs). The scores of padded queries count, so their content matters here.

    Beyond the window of both layers scores are 0 on both sides, as at padded keys.
    """
    check_same_shape("(batch, heads, length)", inputs.q_s.shape[:3], inputs.q_t.shape[:3])
    mask = inputs.rows.mask

    def compared(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        scores = _scores(_wide(q), _wide(k), scale)
        if mask is not None:
            scores = scores + (~mask[:, None, None, :]).to(scores.dtype) * MASKED_SCORE_TINYBERT
        return torch.where(scores <= ZEROED_SCORE_TINYBERT, 0.0, scores)

    student = compared(inputs.q_s, inputs.k_s, inputs.scale_s)
    difference = _within(student - compared(inputs.q_t, inputs.k_t, inputs.scale_t), inputs.window, 0.0)
    return _normalised(difference.square().sum(), inputs.q_s.shape[1] * position_pairs)


def attention_probs_kl(inputs: Attention, *, tokens: float) -> torch.Tensor:
    """Returns KL(P_t || P_s) of the attention probabilities P = softmax(scale * Q K^T over real keys): sum over heads
    and real queries / (H * tokens). MiniLM (arXiv 2002.10957).

    With windows P are the probabilities that the layers compute, over the keys in theirs. Where the student's window is
    the narrower one the teacher's are those given that the key is in it: the divergence would be infinite otherwise.
    """
    mask, (scores_s, scores_t) = inputs.rows.mask, _both_scores(inputs)
    # The lowest finite number instead of -inf: a sequence of padding only then has uniform rows, not NaN ones.
    lowest = torch.finfo(scores_s.dtype).min
    log_s, log_t = (
        F.log_softmax(
            _within(scores if mask is None else scores.masked_fill(~mask[:, None, None, :], lowest), window, lowest),
            dim=-1,
        )
        for scores, window in ((scores_s, inputs.window_s), (scores_t, inputs.window))
    )
    rows = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    total = (rows if mask is None else rows.masked_fill(~mask[:, None, :], 0.0)).sum()
    return _normalised(total, inputs.q_s.shape[1] * tokens)


def relation_kl(
    x_s: torch.Tensor, x_t: torch.Tensor, *, relation_heads: int, mask: torch.Tensor | None, tokens: float
) -> torch.Tensor:
    """Returns KL(R_t || R_s) of the self-relations R = softmax(X X^T / sqrt(d_r)) of the queries, the keys or the
    values: sum over relation heads and real tokens / (relation_heads * tokens). MiniLMv2 (arXiv 2012.15828).

    x (B, H, L, d): heads and head widths may differ between the sides. Heads are concatenated and split anew into
    `relation_heads` heads of width d_r = H * d / relation_heads, each side its own d_r.
    """
    return attention_probs_kl(relations(x_s, x_t, Rows(mask), relation_heads=relation_heads), tokens=tokens)


def logits_kl(z_s: torch.Tensor, z_t: torch.Tensor, *, temperature: float, count: float) -> torch.Tensor:
    """Returns T^2 * sum over rows of KL(softmax(z_t / T) || softmax(z_s / T)) / count; z (P, V), P may be 0.

    Hinton, Vinyals, Dean (arXiv 1503.02531); T^2 keeps the gradient's size independent of T.
    """
    check_same_shape("logits", z_s.shape, z_t.shape)
    log_s = F.log_softmax(_wide(z_s) / temperature, dim=-1)
    log_t = F.log_softmax(_wide(z_t) / temperature, dim=-1)
    total = temperature**2 * (log_t.exp() * (log_t - log_s)).sum()
    return _normalised(total, count, empty=len(z_s) == 0)


def mlm_cross_entropy(z_s: torch.Tensor, labels: torch.Tensor, *, count: float) -> torch.Tensor:
    """Returns -sum over rows of log softmax(z_s)[label] / count; z_s (P, V), labels (P,) int64 (UNSCORED_LABEL: not
    counted); P may be 0.

    BERT's masked language modelling (arXiv 1810.04805).
    """
    logits = _wide(z_s).masked_fill((labels == UNSCORED_LABEL)[:, None], 0.0)
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNSCORED_LABEL)
    return _normalised(total, count, empty=len(z_s) == 0)
