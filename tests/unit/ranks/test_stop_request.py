"""A stop request, in a process of its own that gets real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from fork_server import hear_signals

from engine.ranks.runtime import StopRequest


def in_a_child(body: Callable[[], None]) -> int:
    """Returns the wait status of a process that runs `body`."""
    pid = os.fork()
    if pid == 0:
        hear_signals()
        body()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_second_ctrl_c_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, after the same Ctrl-C
        if stop.signal != signal.SIGINT:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGINT)

    assert os.WTERMSIG(in_a_child(body)) == signal.SIGINT
    assert "press Ctrl-C again to end at once" in capfd.readouterr().err


def test_a_job_in_the_background_of_a_script_does_not_hear_ctrl_c() -> None:
    def body() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(int(stop.requested))

    assert in_a_child(body) == 0
