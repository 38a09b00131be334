"""Losses that a program brings, beside those of the configuration (docs/api.md)."""

from __future__ import annotations

import math
import re
from typing import Any

from engine.config.distill import LossConfig
from engine.errors import UserError
from engine.losses.base import Loss, OwnLosses
from engine.records.fingerprints import source_hash

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def check_own_losses(own: OwnLosses) -> None:
    """Raises UserError for what is no loss, has no name or weight of its own, or no source by which a later start could
    tell that it is the same."""
    names: set[str] = set()
    for kind, weight in own.items():
        if not (isinstance(kind, type) and issubclass(kind, Loss)):
            raise UserError(
                f"own_losses: {kind!r} is not a loss; give a class that extends Loss of engine/losses/base.py"
            )
        name = getattr(kind, "name", "")
        if not _NAME.fullmatch(name):
            raise UserError(f"own_losses: {kind.__name__}.name={name!r}: write a name of a-z, 0-9 and _")
        if name in names or hasattr(LossConfig, name) or name in LossConfig.__dataclass_fields__:
            raise UserError(f"own_losses: {kind.__name__}.name={name!r} is taken; write another name")
        if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
            raise UserError(f"own_losses: the weight of {kind.__name__} is {weight!r}; write a number above 0")
        names.add(name)
    identity_of(own)


def identity_of(own: OwnLosses) -> dict[str, Any]:
    """Returns name, weight and source of each, which decide what is computed, as flat settings. Raises UserError."""
    weights = {f"loss.{kind.name}": float(weight) for kind, weight in own.items()}
    return weights | {f"loss.{kind.name}.source": source_hash(kind) for kind in own}
