"""What a run may go on with that was changed since its checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.distill import RunConfig
from engine.config.marks import FIXED, settings
from engine.errors import UserError
from engine.train.changes import accepted_changes

SAVED = settings(RunConfig(), *FIXED)
STEP = 300


def changes(accept: bool = True, **settings: Any) -> tuple[str, ...]:
    current = {**SAVED, **{key.replace("__", "."): value for key, value in settings.items()}}
    return accepted_changes(SAVED, current, STEP, accept=accept)


def test_what_is_the_same_is_no_change() -> None:
    assert changes(accept=False) == ()


def test_changes_are_listed_when_they_are_accepted() -> None:
    assert changes(train__steps=600, train__lr=1e-4) == (
        "train.lr: 0.0005 -> 0.0001",
        "train.steps: 300 -> 600",
    )


@pytest.mark.parametrize(
    ("accept", "changed", "says", "not_said"),
    [
        (False, {"train__steps": 600}, "train.steps: 300 -> 600). Restore these values, or name another", None),
        (False, {"train__steps": 600}, "or write accept_changes=true", None),
        (False, {"mapping__hidden": "last"}, "mapping.hidden: 'uniform' -> 'last'", "accept_changes"),
        (True, {"mapping__hidden": "last", "train__steps": 600}, "Restore these values", "accept_changes"),
        (True, {"loss__attention": 0.0, "train__steps": 600}, "loss.attention: 1.0 -> 0.0", None),
        (True, {"train__lr": 1e-4}, "train.steps=300: they are done already", None),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_remedy(
    accept: bool, changed: dict[str, Any], says: str, not_said: str | None
) -> None:
    with pytest.raises(UserError) as error:
        changes(accept, **changed)
    assert says in str(error.value)
    assert not_said is None or not_said not in str(error.value)
