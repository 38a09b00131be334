"""SIGKILL at random moments, checkpoints being written all the time: no orphans, and the next start continues from the
newest complete checkpoint, on the curve of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
from faulting import (
    TIMES,
    assert_checkpoints_whole,
    assert_gone,
    end,
    output_file,
    seed_of,
    send,
    start_again,
    unfinished_checkpoints,
)
from launching import Run, kill_session

pytestmark = [pytest.mark.faults, pytest.mark.launcher, pytest.mark.timeout(600 + 120 * TIMES)]

ENDLESS = {"ranks": 2, "micro": 2, "train__steps": 100_000, "train__schedule": "constant", "train__save_every": 1}


def victims(run: Run, launcher: int) -> dict[str, int]:
    """Pids by what is killed. The real launcher is two processes: `deepspeed`, and one that starts the ranks."""
    first, second = run.rank_pids(launcher)
    ranks = {"rank 0": first, "rank 1": second}
    if run.launcher != "real":
        return ranks
    return {**ranks, "launcher": launcher, "launcher of the host": psutil.Process(first).ppid()}


@pytest.mark.parametrize(
    ("stage", "launcher"),
    [
        (3, "forked"),
        pytest.param(1, "real", marks=pytest.mark.thorough),
        pytest.param(3, "real", marks=pytest.mark.thorough),
    ],
)
def test_killed_at_random_moments(make_run, stage: int, launcher: str) -> None:
    """Launchers at any moment; ranks too, or when a checkpoint has just been begun."""
    rng = seed_of(f"kills {stage}")
    run = make_run("killed", stage=stage, launcher=launcher, **ENDLESS)
    told, torn = [], 0
    for turn in range(2 * TIMES):
        process = start_again(run)
        try:
            time.sleep(rng.uniform(0, 3))
            found = victims(run, process.pid)
            name = rng.choice(sorted(found)[:2] if turn % 2 else sorted(found)[-2:])
            while turn % 4 == 0 and not unfinished_checkpoints(run):
                assert process.poll() is None
            send(found[name], signal.SIGKILL)
            assert_gone(process.pid, within_s=45)
        finally:
            output = end(run, process)
        tags = assert_checkpoints_whole(run)
        told.append(f"{name} at {tags[-1] if tags else 'the start'}")
        torn += unfinished_checkpoints(run)
        if name.startswith("launcher"):
            assert "has ended; its rank" in output
            assert run.records("run")[-1]["status"] == "preempted", "a killed launcher costs no finished step"
    print(f"stage {stage}: {len(told)} kills, {torn} of them while a checkpoint was written: {', '.join(told)}")
    assert torn or TIMES < 5, "half of the ranks were killed when one was begun"
    reached = run.steps()[-1]["step"]
    assert reached > 2 * TIMES, "the run went on between the kills"

    undisturbed = make_run("undisturbed", stage=stage, **ENDLESS)
    process = start_again(undisturbed, "--train.save_every", "0")
    try:
        undisturbed.wait_for_step(reached, process)
    finally:
        end(undisturbed, process)
    assert run.curve()[:reached] == undisturbed.curve()[:reached]


@pytest.mark.thorough
def test_launcher_killed_while_it_starts_the_ranks(make_run) -> None:
    """Before a rank can see who started it: nobody else would end it, or let the next start in."""
    rng = seed_of("early kills")
    run = make_run("run", launcher="real", **ENDLESS)
    told = []
    for turn in range(max(2, TIMES)):
        with output_file(run).open("w") as output:
            process = run.start(output=output)
        try:
            time.sleep(rng.uniform(0.5, 12))
            name, victim = "deepspeed", process.pid
            for child in psutil.Process(process.pid).children() if turn % 2 else ():
                if "deepspeed.launcher.launch" in child.cmdline():
                    name, victim = "its process on the host", child.pid
            send(victim, signal.SIGKILL)
            assert_gone(process.pid, within_s=60)
            told.append(name)
        finally:
            end(run, process)
    print(f"{len(told)} early kills: {', '.join(told)}")
    end(run, start_again(run))


@pytest.mark.thorough
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_preempted_at_random_moments(make_run, signum: int) -> None:
    """A scheduler's grace time: any rank is told, or the whole group, and 30 s later all are killed. Code 4, a complete
    checkpoint."""
    rng = seed_of(f"preemption {signum}")
    run = make_run("preempted", launcher="real", **{**ENDLESS, "train__save_every": 0})
    for turn in range(max(1, TIMES // 2)):
        whole_group = signum == signal.SIGTERM and turn % 2 == 1
        process = start_again(run)
        try:
            time.sleep(rng.uniform(0.2, 2))
            ranks = [psutil.Process(pid) for pid in run.rank_pids(process.pid)]
            if whole_group:
                os.killpg(process.pid, signum)
            else:
                send(rng.choice(ranks).pid, signum)
            _, alive = psutil.wait_procs(ranks, timeout=30)
            assert not alive, "30 s were not enough"
            assert_gone(process.pid, within_s=10)
            if not whole_group:  # told to stop itself, the launcher reports a code of its own
                assert process.wait() == 4
        finally:
            end(run, process)
        last = run.records("run")[-1]
        assert last["status"] == "preempted"
        assert last["signal"] in (signum, None), "rank 0 knows its own signal only"
        assert assert_checkpoints_whole(run)[-1] == f"step-{last['step']:08d}"


@pytest.mark.parametrize("fault", ["Ctrl-C", pytest.param("launcher killed", marks=pytest.mark.thorough)])
def test_the_next_start_waits_for_ranks_without_a_launcher(make_run, fault: str) -> None:
    """Started again at once: they are still writing their checkpoint, and it goes on from that. Ctrl-C goes to every
    process of the terminal; `deepspeed` dies of it."""
    run = make_run("run", launcher="real", **{**ENDLESS, "train__save_every": 0})
    process = start_again(run)
    try:
        run.wait_for_step(5, process)
        if fault == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            send(process.pid, signal.SIGKILL)
        again = replace(run, launcher="forked").start()
        try:
            until = time.monotonic() + 120
            while not any(record["resumed_from"] for record in run.records("run") if "resumed_from" in record):
                assert again.poll() is None, again.communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.1)
        finally:
            kill_session(again)
            again.communicate()
    finally:
        output = end(run, process)
    assert ("press Ctrl-C again to end at once" if fault == "Ctrl-C" else "has ended; its rank") in output
    started = [record for record in run.records("run") if record["status"] == "started"]
    preempted = [record for record in run.records("run") if record["status"] == "preempted"]
    assert started[1]["step"] == preempted[0]["step"] >= 5
    assert f"saved step {preempted[0]['step']}; the same command continues" in output
