"""The lock that the drivers of a search share: beside a file, or in a PostgreSQL server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import URL, Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from engine.errors import UserError
from engine.records.flock import Flock, free, try_flock

LOCK_KEY = int.from_bytes(hashlib.sha256(b"mapdistill: the lock of a search").digest()[:8], "big", signed=True)
"""Key of the advisory lock; PostgreSQL keeps those of each database apart."""

SERVER_SETTINGS = {
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "4",
    "tcp_user_timeout": "60000",
    # what an administrator may have limited must not end a wait for the lock, or the lock
    "idle_session_timeout": "0",
    "statement_timeout": "0",
}
"""Settings by which the server sees within a minute that the lock's holder has gone. What its version does not know
is left out."""

APPLY_SETTINGS = text(
    "SELECT set_config(name, value, false) FROM pg_settings "
    "JOIN unnest(CAST(:names AS text[]), CAST(:values AS text[])) AS wanted (name, value) USING (name)"
)

WHO_HOLDS = text(
    "SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid) JOIN pg_database ON oid = database "
    "WHERE locktype = 'advisory' AND granted AND pg_database.datname = current_database() AND objsubid = 1 "
    "AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = CAST(:key AS bigint)"
)
"""Query for who holds the lock; objsubid 1: the key is one bigint."""


class Lock(Protocol):
    def hold(self, timeout_s: float) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


def refuse(shown: str, what: str, remedy: str) -> UserError:
    return UserError(f"search.storage={shown}: {what}; {remedy}")


def _still_held(shown: str, timeout_s: float, holder: str) -> UserError:
    return refuse(
        shown, f"its lock was not free within {timeout_s:g} s", f"end what seems to hold it ({holder}), or start again"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class FileLock:
    """flock on a file beside a database. The file stays: whoever deletes it lets two processes hold two files."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path, self._shown = path, shown

    @contextmanager
    def hold(self, timeout_s: float) -> Iterator[None]:
        """Holds the lock. Raises UserError after timeout_s seconds, and OSError."""
        deadline = time.monotonic() + timeout_s
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not self._take(file):
                if time.monotonic() >= deadline:
                    holder = os.pread(file, 200, 0).decode(errors="replace").strip()
                    raise _still_held(self._shown, timeout_s, holder or "an unknown process")
                time.sleep(random.uniform(0.005, 0.02))
            with contextlib.suppress(OSError):  # a full disk; it is only for those who wait in vain
                os.ftruncate(file, 0)
                os.pwrite(file, f"{_this_process()}\n".encode(), 0)
            yield
        finally:
            free(file)
            os.close(file)

    def _take(self, file: int) -> bool:
        lock = try_flock(file)
        if lock is Flock.MISSING:
            raise refuse(
                self._shown,
                f"the file system of {self._path.parent} has no file locks, without which a search would lose trials",
                "name a file on another one (sqlite:////tmp/search.db) or a PostgreSQL server",
            )
        return lock is Flock.TAKEN

    def close(self) -> None:
        """Does nothing: no file is open between two holds."""


class ServerLock:
    """An advisory lock of a PostgreSQL database, held by a connection of its own outside of transactions."""

    def __init__(self, url: URL, shown: str, *, connect_args: dict[str, Any]) -> None:
        """Raises ImportError without psycopg."""
        self._shown = shown
        name = {} if "application_name" in url.query else {"application_name": _this_process()[:63]}
        self._engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={**connect_args, **name}
        )

    @contextmanager
    def hold(self, timeout_s: float) -> Iterator[None]:
        """Holds the lock. Raises UserError after timeout_s seconds, and SQLAlchemyError."""
        with self._engine.connect() as connection:  # ending it frees the lock
            wanted = {**SERVER_SETTINGS, "lock_timeout": str(max(1, round(timeout_s * 1000)))}
            connection.execute(APPLY_SETTINGS, {"names": list(wanted), "values": list(wanted.values())})
            try:
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != "55P03":
                    raise
                raise _still_held(self._shown, timeout_s, self._who(connection)) from None
            yield
            if not connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY}).scalar_one():
                raise refuse(
                    self._shown,
                    "the lock was not held: each statement went to another connection of the server",
                    "name the server itself, or a pooler that keeps sessions (PgBouncer: pool_mode=session)",
                )

    def _who(self, connection: Connection) -> str:
        row = connection.execute(WHO_HOLDS, {"key": LOCK_KEY}).first()
        return "nobody any more" if row is None else f"{row.application_name or 'unnamed'}, server process {row.pid}"

    def close(self) -> None:
        self._engine.dispose()
