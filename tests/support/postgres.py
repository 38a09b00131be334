"""A private PostgreSQL server for tests that share a database."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    import psycopg

USER, PASSWORD = "mapdistill", "not so secret"


class Cluster:
    """A server on the loopback, in a folder of its own, with a user and a password."""

    def __init__(self, programs: Path, folder: Path, owner: dict[str, Any]) -> None:
        """owner: keywords of subprocess.run; who runs the server."""
        self.port = 0
        self._programs, self._folder, self._owner = programs, folder, owner
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb",
            *("-U", USER, f"--pwfile={password}", "--auth=scram-sha-256"),
            *("--locale=C", "--encoding=UTF8", "--no-sync"),
        )

    @property
    def data(self) -> Path:
        return self._folder / "data"

    def _run(self, program: str, *words: str) -> None:
        output = self._folder / "output.log"
        with output.open("ab") as log:  # a pipe would stay open in the server
            command = [str(self._programs / program), "-D", str(self.data), *words]
            done = subprocess.run(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=120, **self._owner
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{output.read_text()[-3000:]}")

    def start(self) -> None:
        """On the port that it had before, if any."""
        settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self._folder}",
            *("fsync=off", "shared_buffers=16MB", "max_connections=40"),
        ]
        self._run("pg_ctl", "start", "-w", "-o", " ".join(f"-c {setting}" for setting in settings))

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def restart(self) -> None:
        """As after a crash: nobody is told."""
        self.stop()
        self.start()

    def start_on_free_port(self) -> None:
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = int(probe.getsockname()[1])
            try:
                return self.start()
            except RuntimeError as error:  # somebody else may have taken the port
                failed = error
        raise failed

    def connect(self, database: str) -> psycopg.Connection:
        """In autocommit."""
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "dbname": database}
        return psycopg.connect(**where, user=USER, password=PASSWORD, autocommit=True)

    def url(self, database: str) -> str:
        """Creates the database if it does not exist."""
        with self.connect("postgres") as connection:
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [database]).rowcount:
                connection.execute(f'CREATE DATABASE "{database}"')
        return f"postgresql://{USER}:{quote(PASSWORD)}@127.0.0.1:{self.port}/{database}"


def find_programs() -> Path | None:
    """Folder of initdb and pg_ctl: in PATH, or Debian's newest."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: float(one.parent.name), reverse=True)
    return next((one for one in folders if (one / "initdb").exists() and (one / "pg_ctl").exists()), None)


def server_owner() -> dict[str, Any] | None:
    """Keywords of subprocess.run for a user that may run PostgreSQL, which refuses root; None: there is none."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    return None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install 'psycopg[binary]'", exc_type=ImportError)
    programs, owner = find_programs(), server_owner()
    if programs is None:
        pytest.skip("no initdb and pg_ctl in PATH or /usr/lib/postgresql (apt-get install postgresql)")
    if owner is None:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    folder = Path(tempfile.mkdtemp(prefix="mapdistill_pg_", dir="/tmp"))  # pytest's own folders are closed to others
    if owner:
        os.chown(folder, owner["user"], owner["group"])
    # ends the server when its standard input is closed, which a SIGKILL of pytest does too
    keeping = 'read -r _; "$0" stop -D "$1/data" -m immediate; rm -rf "$1"'
    keeper = subprocess.Popen(
        ["sh", "-c", keeping, str(programs / "pg_ctl"), str(folder)],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **owner,
    )
    assert keeper.stdin is not None
    try:
        cluster = Cluster(programs, folder, owner)
        cluster.start_on_free_port()
        yield cluster
    finally:
        keeper.stdin.close()
        keeper.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
