"""DeepSpeed compiles its C++ operators at their first use: where, and what to do where that cannot be."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError, first_line
from engine.ranks import extension_locks

FOLDER = "TORCH_EXTENSIONS_DIR"
SIGNS = ("Error building extension", "Unable to JIT load")


def require_operators() -> None:
    """Compiles, where that is still to be done, the operator that every start on a CPU needs: before there is a run
    directory. Raises UserError where it cannot be."""
    require_folder()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible():  # else DeepSpeed does without, as on a GPU
        with explained():
            builder.load()


def require_folder() -> None:
    """Raises UserError where nothing can be compiled because its folder cannot be written."""
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(os.environ.get(FOLDER) or get_default_build_root())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"DeepSpeed compiles its operators in {folder}, which cannot be written ({error.strerror}); set {FOLDER} "
            "to a folder that can be, with room for 200 MB"
        ) from None


@contextmanager
def explained() -> Iterator[None]:
    """Turns the failure of a compiler inside of the block into a UserError, and takes over what builders that are gone
    have left locked."""
    extension_locks.take_over_stale()
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
