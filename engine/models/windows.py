"""How far each layer of an encoder attends, asked of the masks that transformers itself makes for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from engine.errors import UserError, first_line

NAME = "mapdistill_windows"
FURTHEST = 2**16
"""Largest window that is looked for, in tokens to each side."""
NO_WINDOW = -1


def has_windows(config: PretrainedConfig) -> bool:
    """Tells whether the configuration speaks of layers that do not attend to all tokens."""
    kinds = getattr(config, "layer_types", None)
    return bool(set(kinds) - {"full_attention"}) if kinds else getattr(config, "sliding_window", None) is not None


@torch.no_grad()
def windows_of(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Returns how many tokens to each side every layer attends to, None: to all. The model has no storage (meta
    device).

    Raises UserError for a model whose layers attend to anything else than a window."""
    found: list[int | None] = []

    def attention(
        _: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        window = NO_WINDOW if mask is None else int(mask)
        found.append(None if window == NO_WINDOW else window)
        return query.transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _window_in_place_of_mask)
    try:
        model.set_attn_implementation(NAME)
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = first_line(error)
        raise UserError(
            f"model type {model.config.model_type!r}: to which tokens its layers attend is unknown ({reason}); choose "
            "an encoder whose layers attend to all tokens or to a window to both sides, through transformers' "
            "attention interface (ModernBERT: transformers 5.1 or newer)"
        ) from None
    return tuple(found)


def _window_in_place_of_mask(*, mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
    """Returns the window, (1,) int64, which the model hands on to its layers as it would a mask."""
    query, zero = torch.tensor(FURTHEST), torch.tensor(0)
    keys = torch.arange(2 * FURTHEST + 1)
    seen, seen_later = (mask_function(zero, zero, query + shift, keys + shift).expand(keys.shape) for shift in (0, 7))
    if bool(seen.all()):
        return torch.tensor([NO_WINDOW])
    window = (int(seen.sum()) - 1) // 2
    if not torch.equal(seen, (keys - query).abs() <= window) or not torch.equal(seen, seen_later):
        raise ValueError("some attend to the left only, or to parts of the text")
    return torch.tensor([window])


def window_of_mask(
    *, mask_function: Callable[..., torch.Tensor], local_size: int | None = None, **_: Any
) -> int | None:
    """Returns how many tokens to each side a mask shows, which `local_size` bounds and models count differently. It is
    symmetric: `windows_of` refuses others."""
    if local_size is None:
        return None
    zero = torch.tensor(0)
    seen = mask_function(zero, zero, zero, torch.arange(local_size + 2))
    return int(seen.sum()) - 1
