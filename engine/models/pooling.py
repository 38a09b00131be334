"""One vector of a text, of the states of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

MEAN = ("mean",)


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None, ways: Sequence[str] = MEAN) -> torch.Tensor:
    """Returns the (B, W * D) vectors of (B, L, D) states, W ways of pooling side by side; float32, for float64 states
    float64.

    attention_mask: (B, L), 1 = real, real tokens first; None: all are. What stands at padded positions does not matter,
    not even nan. ways: as sentence-transformers names them. A row without a real token gives 0.
    """
    mask = torch.ones(hidden.shape[:2], device=hidden.device) if attention_mask is None else attention_mask
    real = mask.bool()
    states = hidden if attention_mask is None else hidden.masked_fill(~real[..., None], 0)
    return torch.cat([_WAYS[way](states, real) for way in ways], dim=1)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _sum(states: torch.Tensor) -> torch.Tensor:
    return states.sum(1, dtype=_wide(states))


def _count(real: torch.Tensor) -> torch.Tensor:
    return real.sum(1, keepdim=True).clamp(min=1)


def _mean(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return _sum(states) / _count(real)


def _weighted_mean(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Returns the mean in which the token at place i (from 1) weighs i (SGPT, arXiv 2202.08904)."""
    weights = torch.arange(1, states.shape[1] + 1, device=states.device) * real
    return _sum(states.to(_wide(states)) * weights[..., None]) / weights.sum(1, keepdim=True).clamp(min=1)


def _max(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    largest = states.to(_wide(states)).masked_fill(~real[..., None], -torch.inf).amax(1)
    return largest.masked_fill(~real.any(1, keepdim=True), 0.0)


def _last(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    places = (real.sum(1) - 1).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), places].to(_wide(states))


_WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda states, real: _sum(states) / _count(real).sqrt(),
    "weightedmean": _weighted_mean,
    "cls": lambda states, real: states[:, 0].to(_wide(states)),
    "lasttoken": _last,
    "max": _max,
}
