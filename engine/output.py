"""Standard output that may lose its reader: an ssh session that breaks, a `| head` that has seen enough."""

from __future__ import annotations

import os
import sys
from typing import IO, Any


class Surviving:
    """A text stream that turns silent when nobody reads it any more, instead of ending the job with BrokenPipeError in
    the middle of a step. The rank's guard process notices the same, and tells it to stop (engine/rank_guard.py)."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._turn_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn_silent()

    def _turn_silent(self) -> None:
        """What is still in buffers goes there too, and so does what native code writes."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_lost_readers() -> None:
    """From now on, for this process."""
    if not isinstance(sys.stdout, Surviving):
        sys.stdout, sys.stderr = Surviving(sys.stdout), Surviving(sys.stderr)  # type: ignore[assignment]
