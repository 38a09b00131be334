"""The schedule of the learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from engine.config.distill import TrainConfig
from engine.config.identity import OF_SCHEDULE


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns the schedule of the learning rate over optimizer steps, never micro steps (DeepSpeed steps it once per
    optimizer step)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the optimizer has not stepped yet, and torch says so
        if config.schedule == "linear":
            return get_linear_schedule_with_warmup(optimizer, config.resolved_warmup_steps, config.steps)
        if config.schedule == "cosine":
            return get_cosine_schedule_with_warmup(optimizer, config.resolved_warmup_steps, config.steps)
        if config.schedule == "warmup_stable_decay":
            return get_wsd_schedule(
                optimizer, config.resolved_warmup_steps, config.decay_steps, config.steps, decay_type="linear"
            )
        return get_constant_schedule_with_warmup(optimizer, config.resolved_warmup_steps)


def learning_rates(config: TrainConfig, steps: int) -> list[float]:
    """Returns the learning rates of the first `steps` optimizer steps."""
    share = build_schedule(config, torch.optim.SGD([torch.zeros(1)], lr=config.lr)).lr_lambdas[0]
    return [config.lr * share(step) for step in range(steps)]


def same_rates(saved: Mapping[str, Any], current: Mapping[str, Any], steps: int) -> bool:
    """Returns whether two runs have the same learning rates in their first `steps` optimizer steps and in the one
    after, whose rate a checkpoint holds already, by their identities (engine/train/checkpoint.py)."""
    first, second = (
        TrainConfig(**{name: identity[key] for key, name in OF_SCHEDULE.items() if key in identity})
        for identity in (saved, current)
    )
    return steps <= second.steps and learning_rates(first, steps + 1) == learning_rates(second, steps + 1)
