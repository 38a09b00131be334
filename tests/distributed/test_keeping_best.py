"""The student of the best held-out loss, and the early end of a distillation."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from compare import assert_same_bits
from launching import Run

from engine.records.run_dir import step_tag
from engine.train.checkpoint_files import load_full_state
from engine.train.export import split_state

pytestmark = pytest.mark.launcher

FALLS_AND_RISES = {
    "ranks": 2,
    "micro": 2,
    "train__steps": 12,
    "train__warmup_steps": 12,
    "train__lr": 0.3,
    "train__eval_every": 1,
    "train__save_every": 2,
    "train__keep": 1,
    "train__patience": 2,
}
"""The learning rate grows until the losses jump about."""


def held_out(run: Run) -> dict[int, float]:
    """Held-out losses after a step that has a checkpoint, or could have one."""
    return {r["step"]: r["held_out"]["total"] for r in run.records("step") if "held_out" in r and r["step"] > 0}


def best_step(run: Run) -> int:
    losses = held_out(run)
    return min(losses, key=losses.__getitem__)


def test_an_early_end_exports_the_best_step(finished_run) -> None:
    run = finished_run(**FALLS_AND_RISES)
    best, last = best_step(run), max(held_out(run))
    assert 1 < best == last - 2 < 10
    result = run.records("result")[-1]
    assert (result["step"], result["steps_run"]) == (best, last)
    assert result["held_out"]["total"] == held_out(run)[best]
    assert run.run_dir.complete_tags() == [step_tag(best), step_tag(last)], "train.keep=1, and the best one"
    student, projections = split_state(load_full_state(run.run_dir.checkpoints, step_tag(best)))
    assert_same_bits(run.student(), {name: student[name] for name in run.student()})
    assert_same_bits(run.projections(), projections)
    assert "after 2 evaluations without a better one (held-out loss every step)" in run.output
    why = f"step {best} of {last}, the best by held-out loss ({held_out(run)[best]:.4g}); stopped early: 2 evaluations"
    assert why in run.output
    assert why in (run.run_dir.student / "README.md").read_text()


def test_a_run_killed_behind_its_best_step_loses_nothing(finished_run, tmp_path) -> None:
    """Continued from the best step, it ends where it would have; with more patience it goes on, on other ranks too, and
    still exports the best step, whose checkpoint is then converted."""
    whole = finished_run(**FALLS_AND_RISES)
    best, last = best_step(whole), max(held_out(whole))
    run = whole.copied(tmp_path / "run")
    shutil.rmtree(run.run_dir.checkpoints / step_tag(last))
    shutil.rmtree(run.run_dir.student)
    assert f"continues from {step_tag(best)}" in run.finish()
    assert held_out(run) == held_out(whole)
    assert_same_bits(run.student(), whole.student())
    assert f"{step_tag(last)} ended early, so the run is finished" in run.finish("--dry_run", "true")
    one_rank = replace(run, ranks=1)
    output = one_rank.finish("--train.patience", "4")
    assert f"continues from {step_tag(last)}" in output
    assert max(held_out(run)) == last + 2
    assert best_step(run) == best
    assert f"step {best} of {last + 2}, the best by held-out loss" in output
    assert_same_bits(run.student(), whole.student())
