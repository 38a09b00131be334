"""Files that grow by whole pieces, and files, links and folders that are there completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there completely or not at all, also when the machine stops."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `folder` at the end of the block, unless there was an error. One
    writer at a time. A kill leaves the old folder or the new one, and none between two renames; what else it leaves
    (`.part`, `.old`) the next call removes."""
    part, old = (folder.with_name(f"{folder.name}.{what}") for what in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def relative_link(link: Path, target: Path) -> None:
    """Makes `link` point to `target` in the same tree, whatever it pointed to before."""
    pending = link.with_name(f"{link.name}.part")
    pending.unlink(missing_ok=True)
    pending.symlink_to(target.relative_to(link.parent), target_is_directory=True)
    pending.replace(link)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder (a rename, a removal) outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendFile:
    """A file that grows by whole pieces: one that the disk has no room for leaves nothing behind.

    One process writes; several of these may be open on one file, if one thread uses them all.
    """

    def __init__(self, path: Path) -> None:
        """Makes the file where it is missing. Raises OSError."""
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def append(self, data: bytes | memoryview) -> None:
        """Raises OSError, and the file is then as it was."""
        end = os.fstat(self._handle).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._handle, left) :]  # a full disk takes a part first, and then refuses
        except OSError:
            os.ftruncate(self._handle, end)  # needs no room
            raise

    @property
    def ends_within_a_line(self) -> bool:
        """Whether a writer was killed in the middle of its last piece."""
        end = os.fstat(self._handle).st_size
        return end > 0 and os.pread(self._handle, 1, end - 1) != b"\n"

    def close(self) -> None:
        os.close(self._handle)
