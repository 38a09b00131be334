"""A job in somebody else's process: what it leaves as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.errors import UserError
from engine.ranks import guard, watchdog
from engine.ranks.process import STOPPING, guest
from engine.ranks.runtime import StopRequest, join_ranks


def test_a_guest_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = dict(os.environ), sys.stdout, sys.stderr, [signal.getsignal(number) for number in STOPPING]
    beside = psutil.Process().children()
    with guest():
        watchdog.start_guard()
        StopRequest()
        os.environ.update(RANK="7", MASTER_PORT="29999")
        del os.environ["OMP_NUM_THREADS"]
        assert len(psutil.Process().children()) == len(beside) + 1, "the guard"
        assert sys.stdout is not before[1]
    assert (dict(os.environ), sys.stdout, sys.stderr, [signal.getsignal(number) for number in STOPPING]) == before
    assert psutil.Process().children() == beside


def test_an_error_goes_through_and_the_next_job_may_come() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), guest():
            raise ZeroDivisionError


def test_a_second_job_at_the_same_time_is_refused() -> None:
    errors: list[Exception] = []

    def second() -> None:
        try:
            with guest():
                pass
        except UserError as error:
            errors.append(error)

    with guest():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [str(error) for error in errors] == [
        "another job is running in this process; wait for its end, or start a process for each"
    ]


def test_another_thread_may_run_a_job() -> None:
    stops: list[StopRequest] = []

    def run() -> None:
        with guest():
            stops.append(StopRequest())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not stops[0].requested


def _press_ctrl_c_twice() -> None:
    with guest():
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_the_job_and_not_the_program() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _press_ctrl_c_twice()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_may_take_any_time_is_not_overdue() -> None:
    with guest():
        watchdog.start_guard()
        assert watchdog._heartbeat is not None
        guard.HEARTBEAT.pack_into(watchdog._heartbeat, 0, time.monotonic() - 1000, 1.0)
        assert guard.is_overdue(watchdog._heartbeat)
        watchdog.rest()
        guard.HEARTBEAT.pack_into(watchdog._heartbeat, 0, guard.HEARTBEAT.unpack_from(watchdog._heartbeat)[0], 1.0)
        assert not guard.is_overdue(watchdog._heartbeat)
        watchdog.beat()
        assert guard.HEARTBEAT.unpack_from(watchdog._heartbeat)[0] < float("inf")


def test_a_group_of_the_program_must_be_what_its_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for name, number in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, number)
    says = "is rank 0 of 1 in a group .* its environment says RANK=1 and WORLD_SIZE=2"
    try:
        with pytest.raises(UserError, match=says), guest():
            join_ranks(0)
    finally:
        torch.distributed.destroy_process_group()
