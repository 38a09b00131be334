"""Standard output that may lose its reader (an ssh session or a terminal that goes, a `| head` that has seen enough),
or lead to a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import IO, Any


class Surviving:
    """A text stream that turns silent when nobody reads it any more, instead of ending the job in the middle of a step;
    the rank's guard process notices the same, and tells it to stop (engine/ranks/guard.py). What a full disk has no
    room for is lost."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._silence(error)

    def _silence(self, error: OSError) -> None:
        """Leads a stream without a reader to nowhere: its buffers, and what native code writes."""
        if error.errno not in (errno.EPIPE, errno.EIO):
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_lost_readers() -> None:
    """Makes the output of this process outlive its readers; what an encoding has no character for is shown by its
    number. A stream that was closed before the start (`>&-`) leads to nowhere."""
    if isinstance(sys.stdout, Surviving):
        return
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # or the next file that is opened would have its number
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
            if nothing != number:
                os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not one that a caller has put in its place
            with contextlib.suppress(OSError):  # it writes what is waiting, for which a disk may have no room
                stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Surviving(sys.stdout), Surviving(sys.stderr)
