"""What a user reads while a search runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ga.evolution.genome import Space
from ga.study.evaluations import REPEATED, RUNNING, Evaluation
from ga.view.progress import Pace, Progress, blocks

SPACE = Space(student_layers=2, teacher_layers=4)


def generation(number: int, *fitness: float | None, first: int = 0) -> list[Evaluation]:
    return [
        Evaluation(
            first + i,
            f"{i}-{number}",
            "ok" if value is not None else "diverged",
            fitness=value,
            generation=number,
            seconds=10.0,
        )
        for i, value in enumerate(fitness)
    ]


def test_a_generation_is_said_once_when_it_is_over() -> None:
    lines: list[str] = []
    progress = Progress(SPACE, Pace([]), trials=8, population=3, say=lines.append)
    progress.update([], over=False)
    first = generation(0, 0.5, 0.75, None)
    running = [replace(first[0], outcome=RUNNING, fitness=None), *first[1:]]
    progress.update(running, over=False)
    progress.update(first, over=False)
    assert lines == [], "more of this generation may come"
    second = generation(1, 0.25, first=3)
    progress.update([*first, replace(second[0], outcome=RUNNING, fitness=None)], over=False)
    assert len(lines) == 1
    for words in ("generation 0", "3 of 8", "best 0.7500 (1-0)", "mean 0.6250", "1 without fitness", "left"):
        assert words in lines[0], lines[0]
    progress.update([*first, *second], over=False)
    progress.update([*first, *second], over=True)
    assert len(lines) == 2
    assert "generation 1" in lines[1]
    assert "best 0.7500" in lines[1]


def test_what_an_earlier_driver_has_said_is_not_said_again() -> None:
    lines: list[str] = []
    progress = Progress(SPACE, Pace([]), trials=8, population=2, say=lines.append)
    history = generation(0, 0.5, 0.25) + generation(1, 0.5, 0.25, first=2)
    progress.update(history, over=False)
    progress.update(history, over=True)
    assert not lines
    progress.update(history + generation(2, 0.5, first=4), over=True)
    assert len(lines) == 1


def test_the_time_left_is_that_of_evaluations_that_cost_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of an earlier driver nor those that another search had made the next ones faster."""
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("ga.view.progress.time.monotonic", lambda: next(clock))
    before = generation(0, 0.5, 0.5, 0.5)
    pace = Pace(before)
    reused = [replace(one, seconds=0.0) for one in generation(1, 0.5, 0.5, 0.5, first=3)]
    assert pace.parts([*before, *reused], left=4) == []
    assert pace.parts([*before, *reused, *generation(2, 0.5, 0.5, first=6)], left=4) == [
        "15.0 s per evaluation",
        "1 min 00 s left",
    ]


def test_samplers_without_generations_get_lines_of_the_same_length() -> None:
    spent = [Evaluation(i, f"{i}-0", "ok", fitness=0.5) for i in range(5)]
    spent.insert(1, Evaluation(9, "0-0", REPEATED, fitness=0.5))
    assert [(block.name, len(block.evaluations)) for block in blocks(spent, 2)] == [
        ("no. 1 to 2", 2),
        ("no. 3 to 4", 2),
        ("no. 5 to 6", 1),
    ]
