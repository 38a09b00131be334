"""Stopping and continuing: bitwise the same run, and nothing unfinished is ever used."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from compare import assert_same_bits
from launching import kill_session, write_ds_config
from safetensors.torch import load_file, save_file

from engine.ranks.runtime import DEFAULT_PORT
from engine.records.records import parse_record
from engine.records.run_dir import COMPLETE, step_tag
from engine.train.checkpoint_files import load_full_state

pytestmark = pytest.mark.launcher

HALF = 5
TWO_RANKS = {
    "ranks": 2,
    "micro": 2,
    "train__steps": 2 * HALF,
    "train__save_every": HALF,
    "student__dropout": 0.1,
    "data__mlm_probability": 0.15,
    "loss__mlm": 1.0,
}
"""Accumulation, dropout and masking on."""
RANDOM = {"mapping__hidden": "random-each-step", "student__init": "uniform"}
LONG = {"ranks": 2, "train__steps": 120}
"""To be stopped on the way."""
ONE_RANK = {
    "micro": 8,
    "train__steps": 6,
    "train__save_every": 1,
    "train__keep": 3,
    "trackers": {"csv_monitor": {"enabled": True}},
}


@pytest.mark.parametrize(("stage", "mapping"), [(1, {}), (3, {}), (1, RANDOM)], ids=["1", "3", "1-random"])
def test_half_and_half_equals_the_whole_bitwise(finished_run, tmp_path, stage: int, mapping: dict[str, str]) -> None:
    """2k steps in one go; k steps, a new process, k more. fp32."""
    whole = finished_run(stage=stage, **TWO_RANKS, **mapping)
    # the same run as it lay on disk after k steps, in another folder, continued by a new process
    half = whole.copied(tmp_path / "half")
    shutil.rmtree(half.run_dir.checkpoints / step_tag(2 * HALF))
    shutil.rmtree(half.run_dir.student)
    output = half.finish()
    assert f"continues from {step_tag(HALF)}" in output
    resumed = [r["step"] for r in half.steps()]
    assert resumed == [*range(1, 2 * HALF + 1), *range(HALF + 1, 2 * HALF + 1)]
    assert half.curve() == whole.curve()
    assert half.curve("grad_norm") == whole.curve("grad_norm")
    assert half.curve("lr") == whole.curve("lr")
    assert_same_bits(whole.student(), half.student())
    assert_same_bits(whole.projections(), half.projections())


def test_a_signal_to_one_rank_stops_all_with_a_complete_checkpoint(make_run, finished_run) -> None:
    """Stopped twice, by either signal, and continued: the same bits as a run that nobody stopped."""
    whole, stopped = finished_run(**LONG), make_run("stopped", **LONG)
    last = 0
    for number in (signal.SIGINT, signal.SIGUSR1):
        process = stopped.start()
        try:
            stopped.wait_for_step(last + 3, process)
            os.kill(stopped.rank_pids(process.pid)[1], number)
            output, _ = process.communicate(timeout=200)
        finally:
            kill_session(process)
        assert process.returncode == 4, output[-3000:]
        last = stopped.steps()[-1]["step"]
        assert last < 120
        assert stopped.run_dir.complete_tags()[-1] == step_tag(last)
        assert stopped.records("run")[-1]["status"] == "preempted"
        assert not stopped.records("result")
        assert not stopped.run_dir.student.exists()
    stopped.finish()
    assert stopped.curve() == whole.curve()
    assert_same_bits(whole.student(), stopped.student())


@pytest.fixture
def default_port_taken() -> Iterator[None]:
    """Another job has the port that the launcher gives to every job."""
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # another one may really have it
            other.bind(("", int(DEFAULT_PORT)))
            other.listen()
        yield


@pytest.mark.usefixtures("default_port_taken")
def test_preempted_and_continued_through_the_real_launcher(make_run, finished_run) -> None:
    """What a scheduler does: the launcher passes SIGTERM on and waits for its ranks, which leave a complete checkpoint.
    Continued, the run has the same bits as one that nobody stopped."""
    whole, run = finished_run(**LONG), make_run("preempted", launcher="real", **LONG)
    process = run.start()
    try:
        run.wait_for_step(3, process)
        ranks = [psutil.Process(pid) for pid in run.rank_pids(process.pid)]
        assert len(ranks) == 2
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(ranks, timeout=60)
    finally:
        kill_session(process)
        process.communicate()
    assert not alive
    last = run.steps()[-1]["step"]
    assert last < 120
    assert run.run_dir.complete_tags() == [step_tag(last)]
    assert run.records("run")[-1]["status"] == "preempted"
    assert f"continues from {step_tag(last)}" in run.finish()
    assert run.curve() == whole.curve()
    assert_same_bits(whole.student(), run.student())


def test_a_changed_what_is_refused_and_a_changed_how_is_not(finished_run, tmp_path) -> None:
    run = finished_run(**ONE_RANK).copied(tmp_path / "run")
    shutil.rmtree(run.run_dir.checkpoints / step_tag(6))
    before = sorted(p.name for p in run.run_dir.checkpoints.iterdir())
    output = run.finish("--mapping.hidden", "last", "--loss.attention", "2", "--train.log_every", "2", expect=2)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "mapping.hidden: 'uniform' -> 'last'" in errors[0]
    assert "loss.attention: 1.0 -> 2.0" in errors[0]
    assert "log_every" not in errors[0]
    assert sorted(p.name for p in run.run_dir.checkpoints.iterdir()) == before
    no_trackers = write_ds_config(tmp_path, train_micro_batch_size_per_gpu=8, zero_optimization={"stage": 1})
    how = ["--deepspeed_config", str(no_trackers), "--student.activation_checkpointing", "true"]
    output = run.finish("--train.log_every", "2", *how)
    assert "continues from step-00000005" in output
    assert run.records("result")[-1]["step"] == 6


@pytest.mark.thorough  # tests/distributed/test_proxy.py has the same of a cohort
def test_a_run_with_a_plateau_is_made_longer_from_before_its_decay(make_run) -> None:
    """Bit by bit what it computes in one go; what it had computed beyond is set aside."""
    plateau = {"micro": 8, "train__schedule": "warmup_stable_decay", "train__decay_share": 0.5, "train__save_every": 1}
    whole = make_run("whole", train__steps=8, **plateau)
    whole.finish()
    run = make_run("longer", train__steps=4, train__keep=9, **plateau)
    run.finish()
    output = run.finish("--train.steps", "8")
    assert "step-00000003, step-00000004: of another schedule of the learning rate" in output
    assert "continues from step-00000002" in output
    assert run.curve() == whole.curve()
    assert_same_bits(run.student(), whole.student())
    assert (run.run_dir.checkpoints / "superseded-step-00000004").is_dir()


def test_a_run_goes_on_with_other_settings_when_it_is_told_to(make_run) -> None:
    """A finished run, made longer: its rate is that of the new schedule, its sequences are the next ones."""
    run = make_run("run", micro=8, train__steps=4, train__schedule="constant", train__warmup_steps=0)
    run.finish()
    changes = ["--train.steps", "8", "--train.lr", "5e-4", "--train.global_batch", "16", "--loss.attention", "0.5"]
    output = run.finish(*changes, "--accept_changes", "true")
    assert "step-00000004, from here on with loss.attention: 1.0 -> 0.5; train.global_batch: 8 -> 16" in output
    assert run.curve("lr") == [3e-3] * 4 + [5e-4] * 4  # of the step after
    (turn,) = run.records("run")[-1]["turns"]
    assert (turn["step"], turn["position"]) == (4, 32)
    card = (run.run_dir.student / "README.md").read_text()
    assert "train.lr: 0.003 -> 0.0005; train.steps: 4 -> 8, from step 4 on" in card
    run.finish(*changes, "--train.steps", "9", "--train.lr", "1e-3", "--accept_changes", "true")
    assert [turn["position"] for turn in run.records("run")[-1]["turns"]] == [32, 32 + 4 * 16]


def test_unfinished_checkpoints_are_removed_and_never_used(finished_run, tmp_path) -> None:
    run = finished_run(**ONE_RANK).copied(tmp_path / "run")
    (run.run_dir.checkpoints / step_tag(6) / COMPLETE).unlink()
    output = run.finish()
    assert "removed step-00000006: an unfinished checkpoint" in output
    assert "continues from step-00000005" in output
    assert run.run_dir.complete_tags() == [step_tag(s) for s in (4, 5, 6)]
    rows = (run.run_dir.csv / "loss_total.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", *"123456"], "step 6 was sent before"
    assert len({record["key"] for record in run.records("run") if record["status"] == "tracked"}) == 1


def test_resume_by_name_sets_later_checkpoints_aside(finished_run, tmp_path) -> None:
    run = finished_run(**ONE_RANK).copied(tmp_path / "run")
    weights = run.student()
    output = run.finish("--resume", step_tag(4))
    assert "renamed step-00000006 to superseded-step-00000006" in output
    assert_same_bits(weights, run.student())
    assert run.run_dir.complete_tags() == [step_tag(s) for s in (4, 5, 6)]
    assert "complete ones: step-00000004" in run.finish("--resume", "step-00000003", expect=2)
    assert "resume='never'" in run.finish("--resume", "never", expect=2)


def test_only_the_newest_checkpoints_are_kept(finished_run) -> None:
    run = finished_run(**ONE_RANK)
    assert run.run_dir.complete_tags() == [step_tag(s) for s in (4, 5, 6)]
    assert [r["step"] for r in run.records("checkpoint")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_started_again_writes_nothing(finished_run, tmp_path) -> None:
    run = finished_run(**ONE_RANK).copied(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*") if path.name != "run.lock"}
    output = run.finish()
    assert f"{run.output_dir} is finished at step-00000006; student: {run.run_dir.student}. To train longer" in output
    after = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*") if path.name != "run.lock"}
    before.pop(run.output_dir, None)
    after.pop(run.output_dir, None)
    assert after == before


def test_a_fresh_start_sets_the_logs_of_an_earlier_run_aside(finished_run, tmp_path) -> None:
    run = finished_run(**ONE_RANK).copied(tmp_path / "run")
    shutil.rmtree(run.run_dir.checkpoints)
    output = run.finish("--train.lr", "1e-3")
    assert "renamed records.jsonl to superseded-records.jsonl: the run starts anew" in output
    assert [record["status"] for record in run.records("run")] == ["started", "tracked"]
    assert len(run.records("result")) == 1
    assert list((run.output_dir / "superseded-tensorboard").glob("events.*"))
    assert len((run.run_dir.csv / "loss_total.csv").read_text().splitlines()) == 1 + 6


def test_weights_that_are_not_finite_are_never_saved(make_run) -> None:
    """The loss of a step is computed before its update: it is finite while the update destroys the weights."""
    run = make_run("run", ranks=2, stage=3, train__steps=4, train__save_every=1)
    output = run.finish("--train.lr", "1e38", "--train.warmup_steps", "0", "--optim.weight_decay", "10", expect=3)
    assert "weights are not finite after step 1" in output
    assert run.run_dir.complete_tags() == []
    assert run.records("error")[-1]["terms"] == ["weights"]


def test_a_replaced_teacher_is_noticed(make_run, tiny_world, tmp_path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_world.teacher, teacher)
    run = make_run("run", train__steps=2, train__save_every=1, teacher__path=teacher)
    run.finish()
    shutil.rmtree(run.run_dir.checkpoints / step_tag(2))
    weights = load_file(teacher / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, teacher / "model.safetensors", metadata={"format": "pt"})
    assert "teacher.weights_sha256" in run.finish(expect=2)


def test_micro_batch_may_change_on_the_way(make_run, finished_run) -> None:
    whole = finished_run(**ONE_RANK)
    half = make_run("half", **{**ONE_RANK, "micro": 2})
    shutil.copytree(whole.output_dir, half.output_dir)
    for step in (5, 6):
        shutil.rmtree(half.run_dir.checkpoints / step_tag(step))
    output = half.finish()
    assert "2 micro batch x 4 accumulation" in output
    assert [r["step"] for r in half.steps()][-2:] == [5, 6]
    assert half.curve() == pytest.approx(whole.curve(), rel=1e-5)


def test_divergence_exits_3_and_leaves_the_last_checkpoint(make_run) -> None:
    run = make_run("run", ranks=2, train__steps=30, train__save_every=1, train__log_every=3)
    run.finish("--train.lr", "1e12", "--train.warmup_steps", "20", "--optim.weight_decay", "0", expect=3)
    error = run.records("error")[-1]
    assert error["status"] == "diverged"
    assert error["terms"]
    tags = run.run_dir.complete_tags()
    assert tags, "a checkpoint from before the divergence is there"
    assert all(int(tag[5:]) < error["step"] for tag in tags)
    state = load_full_state(run.run_dir.checkpoints, tags[-1])
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for tag in tags:
        assert json.loads((run.run_dir.checkpoints / tag / COMPLETE).read_text())["step"] == int(tag[5:])
    assert not run.records("result")
    assert not run.run_dir.student.exists()


def test_no_shared_memory_is_left_behind(make_run) -> None:
    """DeepSpeed's own CPU all-reduce would leave 66 MiB a rank in /dev/shm."""
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    make_run("run", ranks=2).finish()
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before


def test_what_the_file_holds_is_said_once_on_stdout(finished_run) -> None:
    run = finished_run(stage=1, **TWO_RANKS)
    assert all(run.records(kind) for kind in ("run", "step", "checkpoint", "result"))
    assert not [line for line in run.output.splitlines() if parse_record(line) is not None]
    for step in range(1, 2 * HALF + 1):
        assert run.output.count(f"step {step}/{2 * HALF}  loss") == 1
    assert run.output.startswith("settings "), "nothing of DeepSpeed's comes before it"
