"""The process that a job runs in: what is set before torch is loaded, and, where a program of somebody else calls the
job, what is as before afterwards. No torch here."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from engine.errors import UserError
from engine.ranks import allocator, environment, rendezvous, threads, watchdog

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a job saves and leaves at."""
_running = threading.Lock()


def prepare_process() -> None:
    """Sets what a rank and its libraries read of the environment; what the user has set stays. Raises UserError for
    what cannot be used."""
    environment.refuse_unusable(os.environ)
    environment.complete(os.environ)
    threads.wait_briefly(os.environ)
    allocator.bound_compiled_kernels(os.environ)


@contextmanager
def guest() -> Iterator[None]:
    """Runs a job inside of a program: one at a time, and afterwards its environment, signal handlers and streams are as
    before, and no process is left beside it. Raises UserError, of all hosts where ranks were about to meet, for another
    job that is running."""
    if not _running.acquire(blocking=False):
        raise UserError("another job is running in this process; wait for its end, or start a process for each")
    variables, streams = dict(os.environ), (sys.stdout, sys.stderr)
    excepthook = sys.excepthook  # torch.distributed puts one of its own in its place
    had_faulthandler = faulthandler.is_enabled()
    handlers = _handlers()
    if handlers.get(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        prepare_process()
        yield
    except Exception as error:
        text = rendezvous.gather_errors(str(error))
        if rendezvous.has_failed():
            rendezvous.leave()
        if isinstance(error, UserError) and text != str(error):
            raise UserError(text) from None
        raise
    finally:
        watchdog.stop_guard()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = streams
        sys.excepthook = excepthook
        if not had_faulthandler:
            faulthandler.disable()
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update({name: text for name, text in variables.items() if os.environ.get(name) != text})
        _running.release()


def _handlers() -> dict[int, Any]:
    """Returns what hears each of the signals in this thread; only Python's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: handler for number in STOPPING if (handler := signal.getsignal(number)) is not None}


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt: a second Ctrl-C ends the job, and not the program (StopRequest in
    engine/ranks/runtime.py)."""
    raise KeyboardInterrupt
