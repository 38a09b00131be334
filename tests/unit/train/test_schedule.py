"""Learning rates, and which runs have the same up to a step."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.distill import TrainConfig
from engine.config.identity import OF_SCHEDULE
from engine.train.schedule import learning_rates, same_rates

STABLE = {"schedule": "warmup_stable_decay", "decay_share": 0.5, "warmup_steps": 2, "lr": 1e-3, "log_every": 1}


def identity(**settings: Any) -> dict[str, Any]:
    config = TrainConfig(**{**STABLE, **settings})
    return {key: getattr(config, name) for key, name in OF_SCHEDULE.items()}


def test_rates_of_warm_up_plateau_and_decay() -> None:
    rates = learning_rates(TrainConfig(steps=8, **STABLE), 8)
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("changed", "steps", "same"),
    [
        ({"steps": 16}, 4, True),
        ({"steps": 16}, 5, False),
        ({"schedule": "constant", "decay_share": None}, 4, True),
        ({"schedule": "constant", "decay_share": None}, 5, False),
        ({"decay_share": 0.25}, 4, True),
        ({"lr": 2e-3}, 0, True),
        ({"lr": 2e-3}, 1, False),
        ({"warmup_steps": 1}, 1, False),
        ({"steps": 4}, 2, True),
        ({"steps": 4}, 3, False),
        ({"steps": 4}, 5, False),
    ],
)
def test_runs_are_the_same_up_to_where_their_rates_part(changed: dict[str, Any], steps: int, same: bool) -> None:
    assert same_rates(identity(steps=8), identity(**{"steps": 8, **changed}), steps) is same
