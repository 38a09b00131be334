"""Whole jobs whose disk is full for a while, or to the end. Checkpoints lie elsewhere here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import only_error, succeed
from launching import Run, kill_session
from small_disk import SmallDisk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.records.records import final_result, parse_record, read_records

MakeRun = Callable[..., Run]
MakeDisk = Callable[[int], SmallDisk]
pytestmark = pytest.mark.faults
STEPS = 150


@pytest.fixture
def make_run_on(make_run: MakeRun, tmp_path: Path) -> Callable[..., Run]:
    """A run whose directory is on that disk, but for its checkpoints."""

    def make(disk: SmallDisk, steps: int) -> Run:
        run = make_run("run", train__steps=steps, train__global_batch=2)
        run.output_dir = disk.folder / "run"
        run.output_dir.mkdir()
        (tmp_path / "checkpoints").mkdir()
        run.run_dir.checkpoints.symlink_to(tmp_path / "checkpoints")
        return run

    return make


def with_disk_filled_at_step(run: Run, step: int, disk: SmallDisk, *, until: Callable[[str], bool]) -> tuple[int, str]:
    """Exit code and output of a run whose disk is full from that step on, until its output says so."""
    process = run.start()
    assert process.stdout is not None
    output, filled = "", False
    try:
        for line in process.stdout:
            output += line
            if f"step {step}/" in line:
                disk.fill()
                filled = True
            if filled and until(line):
                disk.free()
                filled = False
        return process.wait(60), output
    finally:
        kill_session(process)


def test_training_goes_on_without_its_logs_until_there_is_room(
    make_run_on: Callable[..., Run], small_disk: MakeDisk
) -> None:
    disk = small_disk(4)
    run = make_run_on(disk, STEPS)
    code, output = with_disk_filled_at_step(run, 5, disk, until=lambda line: "step 60/" in line)
    assert code == 0, output
    logs = [line for line in output.splitlines() if "cannot be written" in line]
    assert len(logs) == 2, output  # one for the records, one for the curves
    assert "Traceback" not in output
    text = run.run_dir.records.read_text()
    assert all(parse_record(line) is not None for line in text.splitlines()), "a torn line"
    steps = [record["step"] for record in run.steps()]
    (lost,) = [record["lost"] for record in run.records("run") if record["status"] == "records_lost"]
    assert len(steps) + lost == STEPS
    assert steps[-1] == STEPS
    assert f"records missing in it: {lost}" in output
    printed = [record["step"] for line in output.splitlines() if (record := parse_record(line)) is not None]
    assert sorted({*steps, *printed}) == list(range(1, STEPS + 1)), "each in the file or on stdout"
    assert len(printed) == lost
    assert final_result(read_records(run.run_dir.records)) is not None
    curves = EventAccumulator(str(run.run_dir.tensorboard), size_guidance={"scalars": 0})
    curves.Reload()
    found = [event.step for event in curves.Scalars("loss/total")]
    missing = int(re.findall(r"events missing in between: (\d+)", output)[0])
    assert len(found) + missing == STEPS
    assert found[-1] == STEPS


def test_a_result_that_does_not_fit_is_an_exit_code_and_the_same_command_mends_it(
    make_run: MakeRun, small_disk: MakeDisk
) -> None:
    disk = small_disk(1)
    run = make_run("run", train__steps=20)
    run.output_dir.mkdir()
    run.run_dir.records.symlink_to(disk.folder / "records.jsonl")
    code, output = with_disk_filled_at_step(run, 10, disk, until=lambda line: False)
    assert code == 1, output
    error = only_error(output)
    assert f"{run.run_dir.records}: the result is not in it (No space left on device), although the job is" in error
    assert final_result([r for line in output.splitlines() if (r := parse_record(line))]) is not None
    assert final_result(read_records(run.run_dir.records)) is None
    assert run.student()
    disk.free()
    run.finish()
    assert final_result(read_records(run.run_dir.records)) is not None


def test_an_export_without_room_names_the_checkpoint(make_run_on: Callable[..., Run], small_disk: MakeDisk) -> None:
    disk = small_disk(4)
    run = make_run_on(disk, 20)
    code, output = with_disk_filled_at_step(run, 10, disk, until=lambda line: False)
    assert code == 1, output
    error = only_error(output)
    assert re.search(r"run/student cannot be written: .*No space left.* checkpoint step-00000020 is complete", error)
    assert not list(run.output_dir.glob("student*"))
    disk.free()
    script, *words = shlex.split(error.partition(", or python ")[2])
    assert script == "launch/export.py"
    succeed("export", *words)
    assert run.student()
    run.finish()
    assert final_result(read_records(run.run_dir.records)) is not None
