"""The database of a search, and the lock that its drivers share."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from engine.errors import UserError
from ga.optuna_private import share_storage
from ga.study.locks import FileLock, Lock, ServerLock, refuse

LOCK_TIMEOUT_S = 300.0
BUSY_TIMEOUT_S = 60.0
"""Seconds that SQLite waits for another process's transaction."""
QUIET_S = 2.0
"""Seconds of that without a word, when a search starts."""

CLIENT_SETTINGS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 4,
    "tcp_user_timeout": 60_000,
}
"""Settings by which this side sees within a minute that the server's machine has gone."""

PASSING_STATES = ("40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03", "57P05")
"""SQLSTATEs that end by themselves, beside class 08: conflicts, too many connections, shutdown and start."""

REMEDIES = (
    (r"password authentication failed|no password supplied", "correct it in the URL, in ~/.pgpass or in PGPASSWORD"),
    (r"database .* does not exist", "create it with createdb, or correct its name"),
    (r"role .* does not exist", "create it with createuser, or correct the user in the URL"),
    (r"no pg_hba.conf entry", "let this machine in: pg_hba.conf of the server"),
    (r"permission denied", "let the URL's user own the database, or grant it CREATE on the schema"),
)
"""Remedies of refusals that do not pass. The texts are a server's that speaks English."""

DatabaseErrors = (sqlite3.Error, SQLAlchemyError, StorageInternalError)
"""Errors that an open storage raises."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Error numbers that writing may raise without naming the file."""


@contextmanager
def explain_errors(url: str, folder: str) -> Iterator[None]:
    """Turns what a database or a disk raises inside of the block into a UserError."""
    try:
        yield
    except DatabaseErrors as error:
        what = f"search.storage={hide_password(url)}: {explain(error)}"
        raise UserError(f"{what}; fix that, and the same command continues") from None
    except OSError as error:
        where = error.filename2 or error.filename
        if where is None and error.errno not in _NO_ROOM:
            raise
        what = f"{where or folder}: {error.strerror}"
        raise UserError(f"{what}; fix that, and the same command continues") from None


class SearchStorage:
    """An open storage; made by open_storage."""

    def __init__(self, rdb: RDBStorage, lock: Lock, *, shown_url: str) -> None:
        self.shown_url = shown_url
        """URL that is fit to be shown: without the password."""
        self.optuna: BaseStorage = share_storage(rdb)
        """Optuna's storage, for create_study and load_study."""
        self._rdb, self._lock = rdb, lock
        self._holder: int | None = None

    @contextmanager
    def lock(self, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Excludes all other processes and threads that have this storage open. Not reentrant. The system frees the
        lock when its holder dies. Raises UserError when it is not free within timeout_s seconds, and what the
        database raises when the connection that holds it is lost: then the block may not have been alone."""
        me = threading.get_ident()
        assert self._holder != me, "this thread holds the lock already"
        with self._lock.hold(timeout_s):
            self._holder = me
            try:
                yield
            finally:
                self._holder = None

    def close(self) -> None:
        self._rdb.remove_session()
        self._rdb.engine.dispose()
        self._lock.close()


def open_storage(url: str, *, existing: bool = False) -> SearchStorage:
    """Makes the SQLite file, its folder, and Optuna's tables where they are missing.

    existing: refuse a SQLite file that is not there, instead.
    url: sqlite:///RELATIVE, sqlite:////ABSOLUTE, or postgresql://USER:PASSWORD@HOST:PORT/DATABASE. Raises UserError.
    """
    shown = hide_password(url)
    usage = "write sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):  # its text may hold the password
        raise refuse(shown, "is not a URL", usage) from None
    if parsed.drivername == "sqlite":
        return _open_sqlite(parsed, shown, existing=existing)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _open_postgresql(parsed.set(drivername="postgresql+psycopg"), shown)
    raise refuse(shown, f"{parsed.drivername} is not supported", usage)


def transient(error: BaseException) -> bool:
    """Tells whether the database may answer again in a while: it is locked, restarts, or cannot be reached. For what
    Optuna, SQLAlchemy and SearchStorage.lock raise once a storage has been opened."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DBAPIError):
        cause = cause.__cause__
    if cause is None:
        return False
    reason = cause.orig
    if isinstance(reason, sqlite3.Error):
        return _is_locked(reason)
    state = getattr(reason, "sqlstate", None)
    if state is not None:
        return state in PASSING_STATES or state.startswith("08")
    if cause.connection_invalidated:
        return True
    # without a state it has not come from a session: connecting failed
    return isinstance(cause, OperationalError) and _remedy(str(reason)) is None


def hide_password(url: str) -> str:
    """Returns the URL with *** in place of passwords, even when it cannot be parsed."""
    # up to the last @: one in the password itself should be %40, but often is not
    hidden = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&][a-z]*password=)[^&]*", r"\1***", hidden, flags=re.IGNORECASE)


def _remedy(message: str) -> str | None:
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, message)), None)


def explain(error: BaseException) -> str:
    """Returns what the database said, in one line, without the notes of the layers above it."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    reason = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(reason).split())


def _rdb_storage(url: URL, shown: str, **engine_settings: Any) -> RDBStorage:
    """Opens Optuna's storage. Call it under the lock: Optuna's tables and their version are not made in one
    transaction."""
    try:
        return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_settings)
    except RuntimeError as error:
        what = f"its tables are not those of this Optuna version: {explain(error).rstrip('.')}"
        raise refuse(shown, what, "or name another database") from None


def _open_sqlite(url: URL, shown: str, *, existing: bool) -> SearchStorage:
    if url.host:
        raise refuse(shown, "has two slashes", "write sqlite:///RELATIVE or sqlite:////ABSOLUTE")
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:") or url.query:
        raise refuse(
            shown,
            "is not a plain file",
            "name one (sqlite:///runs/study.db): a search in memory could not be continued",
        )
    path = Path(os.path.realpath(str(url.database)))  # one lock whatever link leads there
    lock = FileLock(path.with_name(f"{path.name}.lock"), shown)
    if existing and not path.exists():
        raise refuse(
            shown, f"there is no file {path}", "correct the URL; a relative one starts at the working directory"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise refuse(shown, "is a folder", "name a file in it")
        if not os.access(path.parent, os.W_OK):
            raise refuse(shown, f"folder {path.parent} cannot be written", "name a file in one that can")
        with lock.hold(LOCK_TIMEOUT_S):
            _check_writable(path, shown)
            rdb = _rdb_storage(
                url.set(database=str(path)), shown, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
            )
    except OSError as error:
        raise refuse(
            shown, f"{error.filename or path}: {error.strerror}", "name a file in a folder that can be written"
        ) from None
    except DatabaseErrors as error:
        remedy = "name another file"
        if _is_locked(error):
            remedy = f"another process has locked it: end that (`fuser {path}` names it); the same command continues"
        elif _sqlite_code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            remedy = f"make it writable (chmod u+w {path}), or name another file"
        raise refuse(shown, explain(error), remedy) from None
    return SearchStorage(rdb, lock, shown_url=shown)


def _sqlite_code(error: BaseException) -> int:
    """Returns SQLite's primary result code; 0 when it is not SQLite's error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_locked(error: BaseException) -> bool:
    return _sqlite_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _check_writable(path: Path, shown: str) -> None:
    """Waits until nobody else has the file locked. Raises sqlite3.Error. Without it a read-only database would open
    well, and fail at the first trial."""
    with contextlib.closing(sqlite3.connect(path, timeout=QUIET_S, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not _is_locked(error):
                raise
            print(f"search.storage={shown} is locked; waiting for {BUSY_TIMEOUT_S:g} s", file=sys.stderr, flush=True)
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")
            connection.execute("BEGIN IMMEDIATE")
        connection.execute("PRAGMA user_version = 1")  # of a read-only file SQLite lets a transaction begin
        connection.execute("ROLLBACK")


def _open_postgresql(url: URL, shown: str) -> SearchStorage:
    if "@" in f"{url.host}{url.database}":
        raise refuse(shown, "has more than one @", "write %40 for one in the user or the password")
    settings = {key: value for key, value in CLIENT_SETTINGS.items() if key not in url.query}
    try:
        lock = ServerLock(url, shown, connect_args=settings)
        with lock.hold(LOCK_TIMEOUT_S):
            # pre-ping: a connection that a restart of the server has ended is replaced before it is used
            rdb = _rdb_storage(url, shown, pool_pre_ping=True, connect_args=settings)
    except ImportError as error:
        raise refuse(shown, f"needs psycopg ({error})", "pip install 'mapdistill[postgresql]'") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        what = explain(error)
        remedy = "start the server, or correct host and port" if transient(error) else "correct the URL"
        raise refuse(shown, what, _remedy(what) or remedy) from None
    return SearchStorage(rdb, lock, shown_url=shown)
