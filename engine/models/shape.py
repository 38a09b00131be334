"""The sizes of an encoder that configuration checks and losses need, before any weight is loaded. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    layers: int
    width: int
    """Size of the hidden states."""
    heads: int
    """Number of query heads."""
    vocab: int
    has_mlm_head: bool
