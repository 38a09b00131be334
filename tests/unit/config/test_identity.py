"""What a run was changed in, and what of that it can go on with."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.identity import fixed_keys

SAVED: dict[str, Any] = {
    "train.steps": 4,
    "train.lr": 1e-3,
    "train.log_every": 10,
    "data.content_sha256": "a",
    "data.mlm_probability": 0.0,
    "loss.hidden": 1.0,
    "loss.relation": 0.0,
    "optim.weight_decay": 0.01,
    "mapping.hidden": "uniform",
}


@pytest.mark.parametrize(
    ("change", "fixed"),
    [
        ({"train.steps": 8, "train.lr": 1e-4, "data.content_sha256": "b", "loss.hidden": 0.5}, []),
        ({"train.log_every": 1}, []),
        ({"loss.hidden": 0.0}, ["loss.hidden"]),
        ({"loss.relation": 1.0, "train.steps": 8}, ["loss.relation"]),
        ({"data.mlm_probability": 0.15}, ["data.mlm_probability"]),
        ({"optim.weight_decay": 0.0, "mapping.hidden": "last"}, ["mapping.hidden", "optim.weight_decay"]),
    ],
)
def test_a_run_cannot_go_on_with_other_parameters(change: dict[str, Any], fixed: list[str]) -> None:
    assert fixed_keys(SAVED, {**SAVED, **change}) == fixed
