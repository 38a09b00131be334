"""What held-out losses decide: the best step, and an early end. The models are in tests/distributed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.deepspeed import Execution
from engine.config.distill import TrainConfig
from engine.jobs.distill.held_out import HeldOut, HeldOutLosses
from engine.ranks.runtime import Runtime
from engine.records.run_dir import COMPLETE, RunDir, step_tag
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.checkpoint_storage import SharedFolder


def evaluation(*unsaved: int, **settings: Any) -> HeldOutLosses:
    """unsaved: steps whose checkpoint could not be written."""
    trainee: Any = SimpleNamespace(unsaved=set(unsaved))
    nothing: Any = None
    return HeldOutLosses(TrainConfig(**settings), trainee, nothing, nothing, names=())


def saves(held_out: HeldOutLosses, *totals: float) -> list[bool]:
    """Whether each evaluation asks for a checkpoint, up to an early end."""
    asked = []
    for step, total in enumerate(totals, start=1):
        asked.append(held_out._is_better(HeldOut(step, total, {})))
        if held_out.enough:
            break
    return asked


@pytest.mark.parametrize(
    ("totals", "patience", "threshold", "best", "end"),
    [
        ((5, 4, 3, 2), 1, 0.0, 4, 4),
        ((5, 4, 6, 6, 1), 2, 0.0, 2, 4),
        ((5, 4, 6, 3, 6, 6, 1), 2, 0.0, 4, 6),
        ((5, 4, 4, 4), 2, 0.0, 2, 4),
        ((5, 4.9, 4.8, 3.0), 2, 0.5, 3, 3),  # lower each time, but by less
        ((math.nan, 5, math.nan, math.nan), 2, 0.0, 2, 4),
    ],
)
def test_the_best_step_and_the_end(
    totals: tuple[float, ...], patience: int, threshold: float, best: int, end: int
) -> None:
    held_out = evaluation(patience=patience, patience_threshold=threshold)
    asked = saves(held_out, *totals)
    assert len(asked) == end
    assert held_out.best is not None
    assert held_out.best.step == best == max(step for step, one in enumerate(asked, start=1) if one)
    assert held_out.state()["keep_step"] == best


def test_a_step_whose_checkpoint_could_not_be_written_is_not_the_best() -> None:
    held_out = evaluation(3, keep_best=True)
    assert saves(held_out, 5, 4, 3, 3.5) == [True, True, True, True]
    assert held_out.best == HeldOut(4, 3.5, {})
    held_out = evaluation(3, keep_best=True)
    saves(held_out, 5, 4, 3)
    assert held_out.state()["keep_step"] == 2


def checkpointer(folder: Path, *steps: int) -> Checkpointer:
    """steps: those that have a complete checkpoint."""
    for step in steps:
        (folder / "checkpoints" / step_tag(step)).mkdir(parents=True)
        (folder / "checkpoints" / step_tag(step) / COMPLETE).touch()
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"), 1)
    execution = Execution("", {}, 2, 2, 2, "float32", 1, False, False)
    return Checkpointer(RunDir(folder), execution, runtime, {}, keep=1, storage=SharedFolder(runtime))


@pytest.mark.parametrize(
    ("kept", "changes", "settings", "best"),
    [
        ((2, 4), (), {"patience": 3}, 2),
        ((2, 4), ("train.lr: 0.1 -> 0.2",), {"patience": 3}, 2),
        ((2, 4), ("loss.hidden: 1.0 -> 2.0",), {"patience": 3}, None),  # another sum
        ((4,), (), {"patience": 3}, None),  # gone back to before a better one, which took its place
        ((2, 4), (), {}, None),
    ],
)
def test_a_continued_run_knows_its_best_step(
    tmp_path: Path, kept: tuple[int, ...], changes: tuple[str, ...], settings: dict[str, Any], best: int | None
) -> None:
    first = evaluation(patience=3)
    saves(first, 5, 4, 6, 6)
    second = evaluation(**settings)
    second.restore(first.state(), checkpointer(tmp_path, *kept), Chosen("step-00000004", None, (), changes))
    assert second.best == (None if best is None else first.best)
    assert second.bad == (0 if best is None else 2)


def test_the_end_in_words() -> None:
    held_out = evaluation(steps=9, patience=1)
    assert "no checkpoint with a held-out loss" in (held_out.describe_end(9) or "")
    saves(held_out, 5, 6)
    assert held_out.describe_end(2) == (
        "step 1 of 2, the best by held-out loss (5); stopped early: 1 evaluation without a better one (train.patience)"
    )
    assert evaluation().describe_end(9) is None
