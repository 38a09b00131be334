"""Folders that are replaced as a whole: after a kill the old one is there, or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ATTEMPTS = 10
REMAINS_S = 3600.0
"""Age from which a draft beside the folder is taken for that of a killed process."""


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place at the end unless there was an error."""
    _remove_remains(folder)
    draft = folder.with_name(f"{_draft_prefix(folder)}{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    try:
        yield draft
        _put_in_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # what is there now: nothing, the old folder, or half a draft


def _draft_prefix(folder: Path) -> str:
    return f".{folder.name}-draft-"


def _remove_remains(folder: Path) -> None:
    for draft in folder.parent.glob(f"{_draft_prefix(folder)}*"):
        with contextlib.suppress(FileNotFoundError):  # another driver has just finished with it
            if time.time() - draft.stat().st_mtime > REMAINS_S:  # a younger one may be another driver's
                shutil.rmtree(draft, ignore_errors=True)


def _put_in_place(draft: Path, folder: Path, *, swap: Callable[[Path, Path], bool] | None = None) -> None:
    """A folder cannot be renamed onto one with content, but Linux can swap the two in one step. Where the file system
    does not know that (NFS), the old one is moved away first, and a kill between the two renames leaves both whole
    under the names of drafts."""
    away = draft.with_name(f"{draft.name}-old")
    for _ in range(ATTEMPTS):
        try:
            draft.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (swap or _swap)(draft, folder):
            break
        shutil.rmtree(away, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another driver has just done so, with a folder of its own
            folder.rename(away)
    else:
        raise OSError(errno.EBUSY, "is replaced by others all the time", str(folder))
    shutil.rmtree(away, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Whether the kernel and the file system could."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
