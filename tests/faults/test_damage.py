"""Checkpoints whose files were damaged, one folder shared by two starts, disks that are full."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulting import TIMES, assert_checkpoints_whole, end, output_file, seed_of, start_again
from small_disk import mounted

from engine.config.deepspeed import Execution
from engine.errors import UserError
from engine.ranks.runtime import Runtime
from engine.records.run_dir import COMPLETE, RunDir, step_tag
from engine.train.checkpoint import Checkpointer
from engine.train.checkpoint_files import seal
from engine.train.checkpoint_storage import FolderPerHost, SharedFolder

pytestmark = pytest.mark.faults


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """The file of another checkpoint, of the same size."""
    other = path.parents[1] / step_tag(2) / path.name
    path.write_bytes(other.read_bytes())


BASE = {"ranks": 2, "stage": 1, "train__steps": 6, "train__save_every": 2, "train__keep": 3}


def checkpointer_of(folder: Path) -> Checkpointer:
    """As a start of the same run on one rank would have it; only its choice is asked for here."""
    marker = json.loads((folder / "checkpoints" / step_tag(2) / COMPLETE).read_text())
    execution = Execution("", {}, marker["world_size"], 2, 2, marker["precision"], marker["zero_stage"], False, False)
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"), 1)
    return Checkpointer(RunDir(folder), execution, runtime, marker["identity"], keep=3, storage=SharedFolder(runtime))


@pytest.mark.launcher
@pytest.mark.parametrize("damage", [flip, truncate, remove, swap])
def test_any_damage_to_any_file_is_noticed(finished_run, tmp_path, damage) -> None:
    """Never chosen, named, set aside; the checkpoint before it is."""
    rng = seed_of(f"damage {damage.__name__}")
    base = finished_run(**BASE)
    names = sorted(p.name for p in (base.run_dir.checkpoints / step_tag(6)).iterdir())
    for turn in range(20 * TIMES):
        folder = tmp_path / str(turn)
        shutil.copytree(base.output_dir, folder)
        newest = folder / "checkpoints" / step_tag(6)
        name = rng.choice(names if damage is not swap else [n for n in names if n != COMPLETE])
        damage(newest / name, rng)
        chosen = checkpointer_of(folder).choose("auto")
        assert chosen is not None
        if damage is remove and name == COMPLETE:
            assert chosen.notes == (), "a folder without COMPLETE is no checkpoint, and is removed at the next start"
        else:
            assert "step-00000006 is damaged" in chosen.notes[0]
            assert name in chosen.notes[0]
            assert (folder / "checkpoints" / "damaged-step-00000006").is_dir()
        assert chosen.tag == step_tag(4)
        shutil.rmtree(folder)


@pytest.mark.launcher
def test_all_damaged_or_the_named_one_is_an_error(finished_run, tmp_path) -> None:
    rng = seed_of("all damaged")
    folder = tmp_path / "copy"
    shutil.copytree(finished_run(**BASE).output_dir, folder)
    flip(folder / "checkpoints" / step_tag(4) / "mp_rank_00_model_states.pt", rng)
    with pytest.raises(UserError, match=r"step-00000004 is damaged: mp_rank_00_model_states\.pt has changed"):
        checkpointer_of(folder).choose(step_tag(4))
    assert (folder / "checkpoints" / step_tag(4)).is_dir(), "what is named is not renamed"
    for step in (2, 6):
        remove(folder / "checkpoints" / step_tag(step) / "zero_pp_rank_1_mp_rank_00_optim_states.pt", rng)
    checkpointer = checkpointer_of(folder)
    for _ in range(2):  # a scheduler's next start must not begin anew
        with pytest.raises(UserError, match=r"no checkpoint in .* can be continued") as caught:
            checkpointer.choose("auto")
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing" in str(caught.value)


@pytest.mark.launcher
def test_ranks_on_other_hosts_than_before_are_refused(finished_run, tmp_path) -> None:
    """With checkpoint.storage=local the shards are where their ranks were."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run(**BASE).output_dir, folder)
    for tag in (step_tag(2), step_tag(4), step_tag(6)):
        marker = {**json.loads((folder / "checkpoints" / tag / COMPLETE).read_text()), "ranks": [1]}
        marker["sha256"] = seal(marker)
        (folder / "checkpoints" / tag / COMPLETE).write_text(json.dumps(marker))
    shared = checkpointer_of(folder)
    local = replace(shared, storage=FolderPerHost(shared.runtime))
    with pytest.raises(UserError, match=r"keeps ranks \[1\] and runs rank 0 now"):
        local.choose("auto", set_aside=False)
    other = replace(local, execution=replace(local.execution, world_size=1))
    with pytest.raises(UserError, match="Copy them into one shared output_dir"):
        other.choose("auto", set_aside=False)


@pytest.mark.launcher
def test_a_start_says_what_was_damaged_and_goes_on(finished_run, tmp_path) -> None:
    """The real thing: two ranks, a flipped byte in the newest, a shard missing before it, `latest` pointing nowhere."""
    rng = seed_of("start")
    whole = finished_run(**BASE)
    run = whole.copied(tmp_path / "run")
    flip(run.run_dir.checkpoints / step_tag(6) / "zero_pp_rank_0_mp_rank_00_optim_states.pt", rng)
    remove(run.run_dir.checkpoints / step_tag(4) / "mp_rank_00_model_states.pt", rng)
    (run.run_dir.checkpoints / "latest").write_text("step-00000777")
    output = run.finish()
    assert "step-00000006 is damaged: zero_pp_rank_0_mp_rank_00_optim_states.pt has changed" in output
    assert "step-00000004 is damaged: mp_rank_00_model_states.pt is missing; it is now damaged-step-00000004" in output
    assert "continues from step-00000002" in output
    assert run.curve() == whole.curve()
    assert assert_checkpoints_whole(run) == [step_tag(s) for s in (2, 4, 6)]
    assert (run.run_dir.checkpoints / "latest").read_text() == step_tag(6)


@pytest.mark.launcher
def test_two_starts_in_one_run_directory(make_run) -> None:
    run = make_run("run", ranks=2, train__steps=100_000, train__schedule="constant", train__save_every=2)
    process = start_again(run)
    try:
        run.wait_for_step(3, process)
        refused = run.finish("--train.lr", "1", expect=2)
        errors = [line for line in refused.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        rank_zero = run.rank_pids(process.pid)[0]
        assert f"process {rank_zero} on {os.uname().nodename}" in errors[0]
        assert "is writing there" in errors[0]
        step = run.steps()[-1]["step"]
        run.wait_for_step(step + 3, process)
        assert len(run.records("run")) == 1
        assert "lr: 0.003" in run.run_dir.config.read_text(), "the refused start has changed nothing"
    finally:
        end(run, process)
    process = start_again(run)
    try:
        assert f"took over the run directory from process {rank_zero}" in output_file(run).read_text()
    finally:
        end(run, process)


def test_a_full_disk_at_a_checkpoint_stops_or_goes_on(make_run) -> None:
    """A disk with room for three checkpoints of about 160 KB; later ones fail, on whichever rank writes last."""
    settings = {"stage": 1, "train__steps": 40, "train__save_every": 2, "train__keep": 100}
    run = make_run("full", **settings)
    with mounted(run.run_dir.checkpoints, "700k"):
        output = run.finish(expect=1)
        assert "could not be written" in output
        assert "No space left on device" in output
        assert "Traceback" not in output
        tags = assert_checkpoints_whole(run)
        assert tags
        failed = run.records("error")[-1]
        assert (failed["status"], failed["goes_on"]) == ("checkpoint_failed", False)
        assert {p.name for p in run.run_dir.checkpoints.iterdir() if p.is_dir()} == set(tags), "nothing half written"
        shutil.rmtree(run.run_dir.checkpoints / tags[0])
        process = start_again(run, "--checkpoint.on_error", "continue")
        try:
            until = time.monotonic() + 120
            while not any(r["status"] == "checkpoint_failed" and r["goes_on"] for r in run.records("error")):
                assert time.monotonic() < until, "no checkpoint failed"
                assert process.poll() is None, output_file(run).read_text()[-3000:]
                time.sleep(0.02)
            for tag in run.run_dir.complete_tags()[:-1]:  # room again
                shutil.rmtree(run.run_dir.checkpoints / tag)
            process.wait(timeout=100)
        finally:
            output = end(run, process)
        assert "training goes on" in output
        assert_checkpoints_whole(run)
        newest = run.run_dir.complete_tags()[-1]
    assert int(newest[5:]) > int(tags[-1][5:]), "it has written checkpoints again"


@pytest.mark.thorough
def test_a_full_disk_on_one_of_two_ranks_hangs_nobody(make_run) -> None:
    """DeepSpeed alone would leave the other rank in a barrier. ZeRO-3: both write large files at the same time."""
    run = make_run("full", ranks=2, stage=3, train__steps=40, train__save_every=2, train__keep=100)
    with mounted(run.run_dir.checkpoints, "900k"):
        began = time.monotonic()
        output = run.finish(expect=1)
        print(f"ended {time.monotonic() - began:.0f} s after its start")
        assert "could not be written" in output
        assert assert_checkpoints_whole(run)


@pytest.mark.thorough
def test_no_room_for_a_conversion_is_one_line(make_run) -> None:
    """The disk holds the checkpoint, and not a second one beside it."""
    settings = {"train__steps": 2, "train__save_every": 2}
    run = make_run("run", stage=1, **settings)
    other = make_run("other", stage=2, **settings)
    other.output_dir = run.output_dir
    with mounted(run.run_dir.checkpoints, "240k"):
        run.finish()
        tags = assert_checkpoints_whole(run)
        output = other.finish(expect=2)
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "up to three times as much room beside the checkpoint" in errors[0]
        assert "Traceback" not in output
        assert {path.name for path in run.run_dir.checkpoints.iterdir() if path.is_dir()} == set(tags)
