"""DeepSpeed compiles its C++ operators at their first use: where, by whom, and what to do where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from torch.utils.file_baton import FileBaton

from engine.errors import UserError, first_line
from engine.records.flock import Flock, no_locks_text, try_flock

FOLDER = "TORCH_EXTENSIONS_DIR"
SIGNS = ("Error building extension", "Unable to JIT load")
HELD_BESIDE = "lock.flock"
"""Name of the file beside PyTorch's `lock` whose flock a builder holds."""
SILENT_S = 5.0
"""Seconds of waiting that are not worth a line: ranks that start together look one after the other whether all is
built."""


def require_operators() -> None:
    """Compiles, where that is still to be done, the operator that every start on a CPU needs: before there is a run
    directory. Raises UserError where it cannot be."""
    prepare()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():  # else DeepSpeed does without, as on a GPU
        with explain_failures():
            builder.load()


def prepare() -> None:
    """Makes this process compile in a folder that this library has alone (the user's, where TORCH_EXTENSIONS_DIR is
    set), and take over what a killed process has left locked there. Raises UserError where it cannot be written."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = _Baton  # type: ignore[attr-defined]
    if not os.environ.get(FOLDER):
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        name = f"mapdistill-python{python}-torch{version('torch')}-deepspeed{version('deepspeed')}"
        os.environ[FOLDER] = str(Path(cpp_extension.get_default_build_root(), name))
    folder = Path(os.environ[FOLDER])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"DeepSpeed compiles its operators in {folder}, which cannot be written ({error.strerror}); set {FOLDER} "
            "to a folder that can be, with room for 200 MB"
        ) from None


# until PyTorch > 2.13: torch/utils/file_baton.py waits for a builder that was killed without an end and without a word
class _Baton(FileBaton):
    """PyTorch's lock of one extension, taken under a flock, which the kernel drops when its holder dies: whoever has
    that may take the lock, too."""

    def try_acquire(self) -> bool:
        """Returns False once another process has built the extension."""
        lock = Path(self.lock_file_path)
        self._file = lock.with_name(HELD_BESIDE).open("ab")
        began, announced, waited = time.monotonic(), False, False
        while (flock := try_flock(self._file)) is Flock.HELD:
            waited = True
            if not announced and time.monotonic() - began > SILENT_S:
                print(f"waiting for another process that compiles {lock.parent.name} in {lock.parent}", flush=True)
                announced = True
            time.sleep(self.wait_seconds)
        if flock is Flock.TAKEN and lock.exists():
            print(f"took over {lock}: the process that built this extension has ended; building it again", flush=True)
            lock.unlink()
        elif flock is Flock.TAKEN and not waited and not any(lock.parent.glob("*.so")):
            name = lock.parent.name
            print(f"compiling DeepSpeed's operator {name}, once on this machine: up to 3 minutes", flush=True)
        elif flock is Flock.TAKEN and waited:
            self._file.close()
            return False
        acquired = bool(super().try_acquire())
        if not acquired:
            consequence = f"this process waits for {lock}: remove it if no process compiles {lock.parent.name}"
            print(no_locks_text(lock.parent, consequence), flush=True)
        return acquired

    def release(self) -> None:
        super().release()
        self._file.close()


@contextmanager
def explain_failures() -> Iterator[None]:
    """Turns the failure of a compiler inside of the block into a UserError."""
    try:
        yield
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = first_line(error)
        is_tool = isinstance(error, FileNotFoundError | subprocess.CalledProcessError)  # a compiler's own --version
        if not is_tool and not reason.startswith(SIGNS):
            raise
        compiler = os.environ.get("CXX", "c++")
        raise UserError(
            f"DeepSpeed's operators cannot be compiled with CXX={compiler} ({reason}); install a C++ compiler "
            "(apt install g++) and ninja (pip install ninja), or set CXX to one that works"
        ) from None
