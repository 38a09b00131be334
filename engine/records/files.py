"""Files that grow by whole pieces, and files that are there completely or not at all."""

from __future__ import annotations

import os
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


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder (a rename, a removal) outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendFile:
    """What does not fit on the disk leaves nothing behind, so that the next piece never follows half of one.

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
