"""How the process of a rank ends."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from engine.errors import EXIT_CRASH
from engine.ranks import watchdog


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Starts the guard of this rank (engine/ranks/watchdog.py), runs `main` and ends this process with its code,
    without taking Python's interpreter down: other than daemon threads are not waited for."""
    watchdog.start_guard()
    if watchdog.has_lost_launcher():
        print("error: the launcher of this rank has ended; run the command again", file=sys.stderr, flush=True)
        os._exit(EXIT_CRASH)
    try:
        code = main()
    except SystemExit:  # --help: no rank has been started
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = EXIT_CRASH
    # until PyTorch > 2.13: a thread of Gloo lets go of a collective's tensors some time after the collective has
    # returned, and needs Python's lock for that. When it asks while the interpreter is being taken down, Python 3.11 to
    # 3.13 end the thread, which C++ answers with "terminate called without an active exception": a rank whose work is
    # done and right ends with SIGABRT, and the launcher kills the others (2 of 25 runs on two busy cores;
    # github.com/pytorch/pytorch/issues/190489). `destroy_process_group` does not join those threads, since DeepSpeed
    # keeps references to the groups.
    atexit._run_exitfuncs()
    sys.stdout.flush()  # they raise nothing: see engine/records/stdout.py
    sys.stderr.flush()
    os._exit(code)
