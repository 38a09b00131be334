"""Several hosts (tests/support/hosts.py), and what goes wrong between them: through the real pdsh launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulting import TIMES, assert_checkpoints_whole, seed_of, starts_of, unfinished_checkpoints, wait_for_start
from hosts import LOGIN, Hosts, why_not
from launching import Run, finished, kill_session, spawn
from safetensors.torch import load_file, save_file

from engine.records.run_dir import step_tag

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.faults,
    pytest.mark.launcher,
    pytest.mark.timeout(600 + 120 * TIMES),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

LIMIT_S = 10
ENDLESS = {
    "ranks": 2,
    "micro": 2,
    "train__steps": 100_000,
    "train__schedule": "constant",
    "train__save_every": 2,
    "train__hang_timeout_s": LIMIT_S,
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


def wait_for_step(run: Run, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not any(record["step"] >= step for record in run.steps()):
        assert process.poll() is None, "ended early"
        assert time.monotonic() < until, f"step {step} was not reached"
        time.sleep(0.1)


def assert_no_ranks(hosts: Hosts, names: tuple[str, ...], within_s: float) -> float:
    """Seconds until no rank was left on these hosts."""
    began = time.monotonic()
    while left := [(name, p.pid) for name in names for p in hosts.ranks(name)]:
        assert time.monotonic() < began + within_s, f"still there after {within_s:g} s: {left}"
        time.sleep(0.2)
    return time.monotonic() - began


def launch(hosts: Hosts, run: Run, log: Path, *more: str) -> subprocess.Popen[str]:
    """Its output goes to a file: a pipe that nobody reads would block the ranks."""
    process = hosts.launch(run, *more)
    assert process.stdout is not None
    subprocess.Popen(["dd", f"of={log}", "status=none"], stdin=process.stdout, start_new_session=True)
    return process


def export(run: Run, expect: int = 0) -> str:
    return finished(spawn([sys.executable, "launch/export.py", "--run", str(run.output_dir)]), expect)


@pytest.mark.thorough
def test_a_killed_host(make_run, hosts: Hosts, tmp_path: Path) -> None:
    """As a power failure: no connection is closed. The ranks of the other host end within the limit, and leave stacks;
    the next start continues."""
    rng = seed_of("host killed")
    run = make_run("run", stage=1, **ENDLESS)
    took, torn = [], 0
    for turn in range(max(1, TIMES)):
        newest = (run.run_dir.complete_tags() or [None])[-1]
        log, earlier = tmp_path / f"log {turn}", len(starts_of(run))
        process = launch(hosts, run, log)
        try:
            assert wait_for_start(run, log, process, earlier=earlier)["resumed_from"] == newest
            if newest is None:
                wait_for_step(run, 3, process)  # there is a checkpoint then
            time.sleep(rng.uniform(0.5, 4))
            victim = hosts.names[turn % 2]
            hosts.kill(victim)
            left = tuple(name for name in hosts.names if name != victim)
            took.append(assert_no_ranks(hosts, left, within_s=LIMIT_S + 60))
            assert assert_checkpoints_whole(run)
            torn += unfinished_checkpoints(run)
            stacks = list((run.output_dir / "hangs").glob(f"step-*-{left[0]}-rank-*.txt"))
            assert stacks, "the rank that is left has written its stacks"
            for path in stacks:
                path.unlink()
        finally:
            kill_session(process)
            process.wait()
            for name in hosts.names:
                hosts.boot(name)
    newest, log, earlier = run.run_dir.complete_tags()[-1], tmp_path / "log at last", len(starts_of(run))
    process = launch(hosts, run, log)
    try:
        assert wait_for_start(run, log, process, earlier=earlier)["resumed_from"] == newest
    finally:
        kill_session(process)
        process.wait()
    assert_no_ranks(hosts, hosts.names, within_s=60)
    print(
        f"hosts killed: {len(took)}, {torn} of them while a checkpoint was written; the other host's rank ended after"
    )
    print(f"{', '.join(f'{seconds:.0f}' for seconds in took)} s at a limit of {LIMIT_S} s")


@pytest.mark.thorough
def test_a_network_that_drops(make_run, hosts: Hosts, tmp_path: Path) -> None:
    """Both hosts live, but not a packet passes: each rank ends itself, with its stacks."""
    run = make_run("run", stage=1, **ENDLESS)
    process = launch(hosts, run, tmp_path / "log")
    try:
        wait_for_step(run, 5, process)
        hosts.disconnect("worker-2")
        took = assert_no_ranks(hosts, hosts.names, within_s=LIMIT_S + 60)
        print(f"network dropped: both ranks ended after {took:.0f} s at a limit of {LIMIT_S} s")
    finally:
        kill_session(process)
        process.wait()
        hosts.connect("worker-2")
    stacks = {path.name.split("-rank-")[0][14:]: path for path in (run.output_dir / "hangs").iterdir()}
    assert set(stacks) == {"worker-1", "worker-2"}
    # in a step, or at the checkpoint after it
    assert all("trainer.py" in path.read_text() for path in stacks.values())
    assert assert_checkpoints_whole(run)


@pytest.mark.thorough
def test_an_error_on_one_host_ends_all_at_once(make_run, hosts: Hosts, tiny_world) -> None:
    """The corpus is on disks of the hosts, and worker-2 has none: nobody waits for half an hour."""
    shutil.copytree(tiny_world.corpus, hosts.disk("worker-1") / "corpus")
    run = make_run("run", stage=1, data__path=hosts.local / "corpus", **ENDLESS)
    began = time.monotonic()
    output = hosts.finish(run, expect=2)
    print(f"ended after {time.monotonic() - began:.0f} s")
    errors = [line for line in output.splitlines() if "error:" in line]
    assert len(errors) == 1, output
    assert f"worker-2: {hosts.local / 'corpus'}: no such folder" in errors[0]
    assert_no_ranks(hosts, hosts.names, within_s=10)
    shutil.rmtree(hosts.disk("worker-1") / "corpus")


@pytest.mark.thorough
def test_hosts_with_other_models(make_run, hosts: Hosts, tiny_world) -> None:
    """At the same path, on disks of their own: the ranks would train on different targets, and nothing would say so."""
    for name in hosts.names:
        shutil.copytree(tiny_world.teacher, hosts.disk(name) / "teacher")
    weights = load_file(tiny_world.teacher / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"] += 1
    save_file(weights, hosts.disk("worker-2") / "teacher" / "model.safetensors", metadata={"format": "pt"})
    run = make_run("run", stage=1, teacher__path=hosts.local / "teacher", **ENDLESS)
    output = hosts.finish(run, expect=2)
    errors = [line for line in output.splitlines() if "error:" in line]
    assert errors
    assert all("ranks would not compute the same (worker-2: teacher.weights_sha256: " in line for line in errors)
    assert not run.steps()
    for name in hosts.names:
        shutil.rmtree(hosts.disk(name) / "teacher")


def optimizer_shard(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture
def slots(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[int]:
    """Ranks of each host."""
    hosts.write_hostfile(slots=request.param)
    yield request.param
    hosts.write_hostfile(slots=1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "slots"),
    [(1, 1), (3, 1), (3, 2)],
    indirect=["slots"],
)
def test_shards_on_the_disk_of_each_host(make_run, hosts: Hosts, stage: int, slots: int) -> None:
    ranks = 2 * slots
    settings = {"ranks": ranks, "stage": stage, "micro": 2, "train__steps": 8, "train__save_every": 4, "train__keep": 2}
    shared = make_run("shared", **settings)
    shared.finish()  # one host, as many ranks

    run = make_run("local", checkpoint__storage="local", **settings)
    shutil.rmtree(run.output_dir, ignore_errors=True)
    run.output_dir = hosts.local / f"run {stage} {slots}"
    hosts.finish(run)
    seen = {name: hosts.disk(name) / run.output_dir.name for name in hosts.names}
    shards = {name: {p.name for p in (seen[name] / "checkpoints" / step_tag(8)).glob("*optim*")} for name in seen}
    assert shards["worker-1"] == {optimizer_shard(rank) for rank in range(slots)}
    assert shards["worker-2"] == {optimizer_shard(rank) for rank in range(slots, ranks)}
    assert (seen["worker-1"] / "student" / "model.safetensors").is_file()
    assert {p.name for p in seen["worker-2"].iterdir()} == {"checkpoints"}
    whole = Run(seen["worker-1"])
    assert whole.curve() == pytest.approx(shared.curve(), rel=1e-5)

    for name in hosts.names:  # as if killed after step 4
        shutil.rmtree(seen[name] / "checkpoints" / step_tag(8))
    output = hosts.finish(run)
    assert "continues from step-00000004" in output
    assert whole.curve() == pytest.approx(shared.curve(), rel=1e-5)

    # one host lacks a file of the newest: the one before is used by both
    for name in hosts.names:
        assert (seen[name] / "checkpoints" / step_tag(8)).is_dir()
    (seen["worker-2"] / "checkpoints" / step_tag(8) / optimizer_shard(ranks - 1)).unlink()
    output = hosts.finish(run)
    assert f"step-00000008 is damaged: worker-2: {optimizer_shard(ranks - 1)} is missing" in output
    assert "continues from step-00000004" in output

    # the disks of all hosts brought together: one folder on shared storage, exported and continued as such
    together = make_run("together", **settings)
    newest = together.run_dir.checkpoints / step_tag(8)
    shutil.copytree(seen["worker-1"], together.output_dir, ignore=shutil.ignore_patterns("student", "damaged-*"))
    output = export(together, expect=2)
    assert f"holds the shards of {slots} of {ranks} ranks" in output
    for step in (4, 8):
        folder = seen["worker-2"] / "checkpoints" / step_tag(step)
        shutil.copytree(folder, together.run_dir.checkpoints / step_tag(step), dirs_exist_ok=True)
    export(together)
    for key, weight in load_file(together.output_dir / "student" / "model.safetensors").items():
        assert torch.equal(weight, whole.student()[key])
    (newest / optimizer_shard(0)).write_bytes(b"nonsense")
    output = together.finish()
    assert f"step-00000008 is damaged: {optimizer_shard(0)} has 8 bytes" in output
    assert "continues from step-00000004" in output
    assert together.curve() == pytest.approx(shared.curve(), rel=1e-5)

    # a new disk in one host: nothing to continue from, and which host lacks what is said
    shutil.rmtree(seen["worker-2"])
    output = hosts.finish(run, expect=2)
    assert "worker-2 has no file of it" in output
    assert (seen["worker-1"] / "checkpoints" / step_tag(8)).is_dir(), "what the other host has is left alone"


@pytest.mark.thorough
def test_storage_that_is_shared_and_called_local(make_run, hosts: Hosts) -> None:
    """Each host would write over the files of the other."""
    run = make_run("run", ranks=2, stage=1, micro=2, train__steps=8, train__save_every=2, checkpoint__storage="local")
    output = hosts.finish(run, expect=1)
    assert "the hosts share output_dir. Set checkpoint.storage=shared" in output
    assert not run.run_dir.complete_tags()


@pytest.mark.thorough
def test_hosts_of_one_name_with_disks_of_their_own(make_run, hosts: Hosts) -> None:
    run = make_run("run", ranks=2, stage=1, train__steps=2, checkpoint__storage="local")
    hosts.run("worker-2", ["hostname", "worker-1"])
    try:
        output = hosts.finish(run, expect=2)
    finally:
        hosts.run("worker-2", ["hostname", "worker-2"])
    assert "several are named worker-1; give each its own (hostname)" in output
    assert not run.run_dir.complete_tags()


@pytest.mark.thorough
def test_hosts_that_do_not_share_the_run_directory(make_run, hosts: Hosts) -> None:
    """The commonest mistake: found at the first checkpoint, and not at the end."""
    run = make_run("unshared", ranks=2, stage=1, micro=2, train__steps=8, train__save_every=2)
    run.output_dir = hosts.local / "unshared"
    output = hosts.finish(run, expect=1)
    assert "the hosts do not share output_dir" in output
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in output
    assert not Run(hosts.disk("worker-1") / "unshared").run_dir.complete_tags()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM to deepspeed",
        "SIGTERM to its group",
        "login host killed",
    ],
)
def test_the_launcher_is_stopped_or_lost(make_run, hosts: Hosts, tmp_path: Path, how: str) -> None:
    """The launcher runs on a third host. Told to stop, it tells the hosts, and all ranks write a checkpoint; killed,
    its ssh connections break, and the ranks notice and do the same."""
    run = make_run("run", stage=1, **{**ENDLESS, "train__save_every": 50})
    process = launch(hosts, run, tmp_path / "log")
    try:
        wait_for_step(run, 60, process)
        if how == "login host killed":
            hosts.kill(LOGIN)
        elif how == "SIGTERM to deepspeed":
            running = hosts.processes(LOGIN)
            deepspeed = next(p for p in running if any(word.endswith("bin/deepspeed") for word in p.cmdline()))
            deepspeed.terminate()
        else:
            os.killpg(process.pid, signal.SIGTERM)
        took = assert_no_ranks(hosts, hosts.names, within_s=60)
    finally:
        kill_session(process)
        process.wait()
        hosts.boot(LOGIN)
    last = run.records("run")[-1]
    print(f"{how}: ranks gone after {took:.1f} s; {last['status']}, newest {run.run_dir.complete_tags()[-1]}")
    assert assert_checkpoints_whole(run)
    assert last["status"] == "preempted"
    assert run.run_dir.complete_tags()[-1] == step_tag(last["step"])


@pytest.mark.thorough
def test_pdsh_outlives_a_killed_deepspeed_command(make_run, hosts: Hosts, tmp_path: Path) -> None:
    """Nothing tells pdsh, so the job trains on; without pdsh it stops, with a checkpoint."""
    run = make_run("run", stage=1, **{**ENDLESS, "train__save_every": 50})
    process = launch(hosts, run, tmp_path / "log")
    try:
        wait_for_step(run, 10, process)
        words = {p: p.cmdline() for p in hosts.processes(LOGIN)}
        pdsh = next(p for p, found in words.items() if "pdsh" in Path(found[0]).name)
        next(p for p, found in words.items() if any(word.endswith("bin/deepspeed") for word in found)).kill()
        step = run.steps()[-1]["step"]
        time.sleep(5)
        assert run.steps()[-1]["step"] > step
        pdsh.kill()
        took = assert_no_ranks(hosts, hosts.names, within_s=60)
    finally:
        kill_session(process)
        process.wait()
    print(f"pdsh killed: ranks gone after {took:.1f} s")
    last = run.records("run")[-1]
    assert last["status"] == "preempted"
    assert assert_checkpoints_whole(run)[-1] == step_tag(last["step"])


def test_nothing_is_left(hosts: Hosts) -> None:
    """Not only ranks: the launcher's processes, sessions and guards end soon after them."""
    hosts.assert_idle()
