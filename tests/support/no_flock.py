"""A file system without locks, as NFS and Lustre often are."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every lock of a file end as there."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
