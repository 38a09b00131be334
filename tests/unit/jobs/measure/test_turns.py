"""Functions that are timed in turns."""

from __future__ import annotations

import time

import pytest
import torch

from engine.jobs.measure.turns import LEAST_ROUNDS, WARM_UP, Times, take_turns

CPU = torch.device("cpu")


def test_each_round_calls_all_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ABC"}, 4, CPU)
    assert calls == ["A", "B", "C"] * (WARM_UP + 4)
    assert {name: len(found.wall) for name, found in times.items()} == dict.fromkeys("ABC", 4)


def test_a_limit_ends_the_rounds_but_for_the_least() -> None:
    times = take_turns({"slow": lambda: time.sleep(0.002)}, 1000, CPU, limit_s=0.0)
    assert len(times["slow"].wall) == LEAST_ROUNDS
    assert min(times["slow"].wall) >= 0.002


def test_a_speedup_is_taken_within_rounds() -> None:
    """A round in which the machine was busy slows both."""
    first, second = Times([1.0, 8.0, 3.0]), Times([0.5, 2.0, 1.0])
    assert second.speedup_over(first) == (3.0, 2.0, 4.0)
    assert second.ratio_to(first) == "3.00 (2.00 to 4.00)"
    assert first.speedup_over(first) == (1.0, 1.0, 1.0)
    assert second.ms == pytest.approx(1000.0)
