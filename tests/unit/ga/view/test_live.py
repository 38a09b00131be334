"""What one driver shows beside others."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.view.live import TENSORBOARD, LiveView


def live_view(folder: Path) -> LiveView:
    space = Space(student_layers=2, teacher_layers=4)
    study = optuna.create_study(direction="maximize")
    return LiveView(SearchConfig(output_dir=str(folder)), space, study, tasks=["SST-2"])


def test_one_of_two_drivers_writes_curves_until_it_ends(tmp_path: Path) -> None:
    files = tmp_path / TENSORBOARD / "search"
    with live_view(tmp_path) as second:
        with live_view(tmp_path) as first:
            first.update()
            second.update()
            assert len(list(files.iterdir())) == 1
        (left,) = files.iterdir()
        second.update()
        assert left not in files.iterdir()


def test_without_file_locks_it_goes_on_with_a_word(
    tmp_path: Path, no_flock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with live_view(tmp_path) as view:
        for _ in range(2):
            view.update()
    said = f"{tmp_path}: no file locks there, so nothing keeps a second writer of {TENSORBOARD} out"
    assert capsys.readouterr().out.count(said) == 1
    assert list((tmp_path / TENSORBOARD).rglob("events.out.tfevents.*"))
