"""What a run was changed in since a checkpoint, and whether it may go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.identity import OF_SCHEDULE, changed_keys, describe_changes, fixed_keys
from engine.errors import UserError
from engine.train.schedule import same_rates

Identity = Mapping[str, Any]
"""Flat settings and input hashes that decide what a run computes."""


def has_changed(saved: Identity, current: Identity, step: int) -> bool:
    """Returns whether what was computed up to `step` is not what the run computes now up to there. Another schedule
    does not change it, if the learning rates are the same up to there."""
    changes = changed_keys(saved, current)
    if not changes or not set(changes) <= OF_SCHEDULE.keys():
        return bool(changes)
    return not same_rates(saved, current, step)


def accepted_changes(saved: Identity, current: Identity, step: int, *, accept: bool) -> tuple[str, ...]:
    """Returns `key: saved -> current` of what the run was changed in, and goes on with from `step` on. accept: whether
    to go on with what can be changed on the way. Raises UserError for what was changed otherwise."""
    if not has_changed(saved, current, step):
        return ()
    changes, fixed = describe_changes(saved, current), fixed_keys(saved, current)
    remedy = "Restore these values, or name another output_dir"
    if not fixed and not accept:
        remedy += "; or write accept_changes=true, and the run goes on with them from here"
    if fixed or not accept:
        raise UserError(f"the run was changed in what it computes ({'; '.join(changes)}). {remedy}")
    if current["train.steps"] <= step:
        raise UserError(
            f"train.steps={current['train.steps']}: they are done already, so the changes would have no "
            "effect; set more steps"
        )
    return tuple(changes)
