"""What one driver shows beside others."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import optuna
import pytest

from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.evaluations import GENOME, JOB, OUTCOME, SECONDS
from ga.view.live import TENSORBOARD, LiveView, Stage


def live_view(folder: Path) -> LiveView:
    space = Space(student_layers=2, teacher_layers=4)
    study = optuna.create_study(direction="maximize")
    return LiveView(SearchConfig(output_dir=str(folder)), space, study, tasks=["SST-2"])


def update(view: LiveView) -> None:
    with view.search_stage():
        view.update()


def add_evaluation(study: optuna.Study, *, seconds: float = 5.0) -> None:
    trial = study.ask()
    for key, value in ((GENOME, "2-4"), (OUTCOME, "ok"), (SECONDS, seconds), (JOB, "here:trials/00000")):
        trial.set_user_attr(key, value)
    study.tell(trial, 0.5)


def test_a_list_has_a_line_for_each_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(direction="maximize")
    add_evaluation(study)
    for seed in range(2):
        study.enqueue_trial({"seed": seed})
    with live_view(tmp_path) as view, view.list_stage(study, name="confirmation"):
        view.count()
        assert capsys.readouterr().out == "", "nothing has ended since"
        add_evaluation(study)
        view.count()
        view.count()
        line, rest = capsys.readouterr().out.split("\n", 1)
        assert re.fullmatch(r"confirmation      2 of 3  \d\.\d s per evaluation  \d s left", line), line
        assert rest == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_reckons_with_what_cost_something_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tqdm takes (n - initial) evaluations for the time since its start."""
    monkeypatch.setattr("sys.stderr", Terminal())
    study = optuna.create_study(direction="maximize")
    add_evaluation(study)
    stage = Stage(study, name="search", total=9)
    add_evaluation(study, seconds=0.0)
    add_evaluation(study)
    stage.refresh(with_best=True)
    stage.close()
    assert (stage._bar.n, stage._bar.initial) == (3, 2)
    assert "search" in sys.stderr.getvalue()
    assert "3/9" in sys.stderr.getvalue()


def test_one_of_two_drivers_writes_curves_until_it_ends(tmp_path: Path) -> None:
    files = tmp_path / TENSORBOARD / "search"
    with live_view(tmp_path) as second:
        with live_view(tmp_path) as first:
            update(first)
            update(second)
            assert len(list(files.iterdir())) == 1
        (left,) = files.iterdir()
        update(second)
        assert left not in files.iterdir()


def test_without_file_locks_it_goes_on_with_a_word(
    tmp_path: Path, no_flock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with live_view(tmp_path) as view:
        for _ in range(2):
            update(view)
    said = f"{tmp_path}: no file locks there, so a second writer of {TENSORBOARD} would not be noticed"
    assert capsys.readouterr().out.count(said) == 1
    assert list((tmp_path / TENSORBOARD).rglob("events.out.tfevents.*"))
