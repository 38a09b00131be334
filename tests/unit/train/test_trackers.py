"""What a monitor sends to a run's trackers, through DeepSpeed's own: CSV files, and Weights & Biases offline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.data.batch import Counts
from engine.records.records import read_records
from engine.records.run_dir import HELD_OUT, RunDir
from engine.train.monitor import Monitor
from engine.train.step_report import Interval, StepReport
from engine.train.trackers import TRACKED

CSV = {"csv_monitor": {"enabled": True}}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank: DeepSpeed's monitor asks which this is."""
    store = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setattr(deepspeed.comm.comm, "cdb", None)  # DeepSpeed's group, which afterwards is gone
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # it takes minutes to compile
        deepspeed.init_distributed(
            "gloo", init_method=f"file://{store}", rank=0, world_size=1, auto_mpi_discovery=False, verbose=False
        )
        yield
    torch.distributed.destroy_process_group()


def begun(run_dir: RunDir, step: int, trackers: dict[str, Any] = CSV) -> Monitor:
    """The monitor of a start that continues after `step`."""
    monitor = Monitor(
        active=True,
        tensorboard=run_dir.tensorboard,
        records=run_dir.records,
        steps=9,
        flops_per_token=1.0,
        device=torch.device("cpu"),
        config_text="",
        trackers=trackers,
    )
    monitor.write_record("run", status="started", step=step)
    monitor.begin(step)
    return monitor


def show(
    monitor: Monitor, *, steps: tuple[int, ...] = (), held_out: int | None = None, scores: int | None = None
) -> None:
    """Shows losses of these steps, then held-out losses and scores."""
    for step in steps:
        terms, weights = {"hidden/1-2": step / 4}, {"hidden/1-2": 2.0}
        interval = Interval(step, Counts(1, 4, 16, 4, 16), {}, 0.0)
        monitor.step(StepReport(interval, step / 2, terms, {}, weights, 0.5, None, None, 0))
    if held_out is not None:
        monitor.held_out(held_out, held_out / 8, {"hidden/1-2": held_out / 16})
    if scores is not None:
        monitor.scores(scores, {"score": scores / 32})


def rows(run_dir: RunDir, name: str) -> list[str]:
    return (run_dir.csv / f"{name}.csv").read_text().splitlines()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


@pytest.mark.parametrize("held_out", [2, None], ids=["killed after the evaluation", "killed within it"])
def test_a_run_that_is_continued_sends_each_step_once(tmp_path: Path, held_out: int | None) -> None:
    """With the tags and steps of TensorBoard."""
    run_dir = RunDir(tmp_path)
    killed = begun(run_dir, 0)
    show(killed, held_out=0)
    show(killed, steps=(1, 2), held_out=held_out)
    again = begun(run_dir, 1)
    show(again, steps=(2,), held_out=2)
    show(again, steps=(3,), scores=3)
    again.close()
    assert rows(run_dir, "loss_total") == ["step,total", "1,0.5", "2,1.0", "3,1.5"]
    assert rows(run_dir, "pair_hidden_1-2") == ["step,1-2", "1,0.25", "2,0.5", "3,0.75"]
    assert rows(run_dir, "held_out_loss_total") == ["step,total", "0,0.0", "2,0.25"]
    assert rows(run_dir, "score_score") == ["step,score", "3,0.09375"]
    assert points(tmp_path, "loss/total") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert points(tmp_path / HELD_OUT, "loss/total") == [(0, 0.0), (2, 0.25)]
    assert points(tmp_path / HELD_OUT, "pair/hidden/1-2") == [(0, 0.0), (2, 0.125)]
    keys = [record["key"] for record in read_records(run_dir.records) if record.get("status") == TRACKED]
    assert len(keys) == 2
    assert len(set(keys)) == 1, "the services know the run again"


def test_what_a_start_without_trackers_has_shown_is_sent_when_it_is_computed_again(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for step, trackers in ((0, CSV), (1, {}), (1, CSV)):
        monitor = begun(run_dir, step, trackers)
        show(monitor, steps=(step + 1,))
        monitor.close()
    assert rows(run_dir, "loss_total") == ["step,total", "1,0.5", "2,1.0"]


def test_a_tracker_that_cannot_be_opened_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.csv.write_text("in its way")
    monitor = begun(run_dir, 0)
    show(monitor, steps=(1,))
    monitor.close()
    says = "warning: csv_monitor has failed ([Errno 17] File exists: "
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(says)]
    assert points(tmp_path, "loss/total") == [(1, 0.5)]


def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(tmp_path)
    monitor = begun(run_dir, 0)
    show(monitor, steps=(1,))
    shutil.rmtree(run_dir.csv)
    show(monitor, steps=(2, 3))
    monitor.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: csv_monitor has failed ([Errno 2] No such file or directory: ")
    assert warnings[0].endswith("; training continues without it")
    assert points(tmp_path, "loss/total") == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_weights_and_biases_has_a_run_for_each_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when several follow each other in one process, as fine-tunings do."""
    pytest.importorskip("wandb", reason="Weights & Biases is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = []
    for name in ("first", "second"):
        run_dir = RunDir(tmp_path / name)
        run_dir.root.mkdir()
        monitor = begun(run_dir, 0, {"wandb": {"enabled": True, "project": "tests"}})
        show(monitor, held_out=0)
        show(monitor, steps=(1,))
        monitor.close()
        (key,) = (record["key"] for record in read_records(run_dir.records) if record.get("status") == TRACKED)
        (file,) = run_dir.root.glob(f"wandb/offline-run-*-{key}/run-{key}.wandb")
        assert b"held_out/loss/total" in file.read_bytes()
        keys.append(key)
    assert len(set(keys)) == 2
