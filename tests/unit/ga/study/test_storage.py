from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from launching import ROOT, free_port
from postgres import PASSWORD, Cluster

from engine.errors import UserError
from ga.study.locks import LOCK_KEY
from ga.study.storage import hide_password, open_storage, transient

MakeUrl = Callable[[str], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """make_url(name): of a storage that does not exist yet."""
    if request.param == "sqlite":
        return lambda name: f"sqlite:///{tmp_path}/new folder/{name}.db"
    cluster: Cluster = request.getfixturevalue("postgres")
    return lambda name: cluster.url(f"{name}_{tmp_path.name}")


def start(code: str, *words: object) -> subprocess.Popen[str]:
    """A Python process with the storage's imports; words are in sys.argv[1:]."""
    imports = (
        "import sys, time, os, optuna\nfrom pathlib import Path\nfrom ga.study.storage import open_storage, transient\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", imports + code, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Of processes that must succeed."""
    found = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(found)
    return found


HOLDER = """
storage = open_storage(sys.argv[1])
with storage.lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(make_url: MakeUrl) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A storage, and another process that holds its lock."""
    url = make_url("held")
    process = start(HOLDER, url)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_four_processes_open_a_new_database_at_once_and_exclude_each_other(make_url: MakeUrl, tmp_path: Path) -> None:
    url, counter, go = make_url("new"), tmp_path / "counter", tmp_path / "go"
    counter.write_text("0")
    code = """
url, counter, go = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
while not go.exists():
    pass
storage = open_storage(url)
for _ in range(50):
    with storage.lock():
        value = int(counter.read_text())
        os.sched_yield()
        counter.write_text(str(value + 1))
"""
    processes = [start(code, url, counter, go) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    outputs(processes)
    assert counter.read_text() == "200"


def test_threads_of_one_storage_exclude_each_other(make_url: MakeUrl) -> None:
    storage = open_storage(make_url("threads"))
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with storage.lock():
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    assert most == 1


@pytest.mark.faults
def test_the_lock_is_free_when_its_holder_is_killed(holder: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = holder
    threading.Timer(0.5, process.send_signal, [signal.SIGKILL]).start()
    began = time.monotonic()
    open_storage(url).close()  # which takes the lock
    assert 0.3 < time.monotonic() - began < 20


@pytest.mark.faults
def test_the_lock_is_not_waited_for_forever(holder: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = holder
    process.send_signal(signal.SIGSTOP)
    code = """
import ga.study.storage
ga.study.storage.LOCK_TIMEOUT_S = 0.3
try:
    open_storage(sys.argv[1])
except ValueError as error:
    print(error)
"""
    (said,) = outputs([start(code, url)])
    assert f"search.storage={hide_password(url)}: its lock was not free within 0.3 s; end what seems to hold it" in said
    assert f"process {process.pid} on " in said


def test_a_lock_that_timed_out_can_be_had_later(make_url: MakeUrl) -> None:
    url = make_url("later")
    ours, others = open_storage(url), open_storage(url)
    with ours.lock():
        with pytest.raises(UserError, match=r"within 0\.2 s; end what seems to hold it \(process"), others.lock(0.2):
            pass
        with pytest.raises(AssertionError, match="holds the lock already"), ours.lock(0.2):
            pass
    with others.lock(0.2):
        pass
    with pytest.raises(ZeroDivisionError), others.lock(0.2):
        raise ZeroDivisionError
    with ours.lock(5):
        pass
    ours.close()
    others.close()


def test_processes_see_each_others_trials(make_url: MakeUrl) -> None:
    url = make_url("study")
    code = """
study = optuna.create_study(storage=open_storage(sys.argv[1]).optuna, study_name="one", load_if_exists=True)
study.set_user_attr("from", "the other")
trial = study.ask()
study.tell(trial, 0.5)
"""
    storage = open_storage(url)
    study = optuna.create_study(storage=storage.optuna, study_name="one")
    mine = study.ask()
    outputs([start(code, url)])
    assert study.user_attrs == {"from": "the other"}
    assert [trial.value for trial in study.get_trials()] == [None, 0.5]
    study.tell(mine, 0.25)
    storage.close()
    again = open_storage(url)
    assert [trial.value for trial in optuna.load_study(storage=again.optuna, study_name="one").trials] == [0.25, 0.5]
    again.close()


def test_links_and_relative_paths_lead_to_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    here, there = (
        open_storage("sqlite:///link/a study {1}.db"),
        open_storage(f"sqlite:///{tmp_path}/real/a study {{1}}.db"),
    )
    monkeypatch.chdir("/")  # a relative path is that of the moment of opening
    with here.lock(), pytest.raises(UserError, match="was not free"), there.lock(0.1):
        pass
    optuna.create_study(storage=here.optuna, study_name="one")
    assert optuna.get_all_study_names(there.optuna) == ["one"]
    assert sorted(os.listdir(tmp_path / "real")) == ["a study {1}.db", "a study {1}.db.lock"]
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "is not a URL; write sqlite:///FILE"),
        ("postgresql://me:pw@host:port/db", "is not a URL; write sqlite"),
        ("mysql://host/db", "mysql is not supported; write sqlite:///FILE or postgresql:"),
        ("postgresql+psycopg2://host/db", r"postgresql\+psycopg2 is not supported"),
        ("sqlite://", "is not a plain file; name one"),
        ("sqlite:///:memory:", "is not a plain file; .* a search in memory could not be continued"),
        ("sqlite:///file:a.db?mode=memory&uri=true", "is not a plain file"),
        ("sqlite://study.db", "has two slashes; write sqlite:///RELATIVE"),
        ("sqlite:////tmp", "is a folder; name a file in it"),
        ("sqlite:////dev/null/study.db", "/dev/null: .*; name a file in a folder that can be written"),
        ("sqlite:////proc/study.db", "folder /proc cannot be written|/proc/study.db"),
        ("postgresql://me:p@ss@host/db", "has more than one @; write %40"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^search.storage={re.escape(hide_password(url))}: .*({message})"):
        open_storage(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://me:se@cr/et@host/db", "postgresql://me:***@host/db"),
        (
            "postgresql://me@host/db?sslmode=require&password=secret",
            "postgresql://me@host/db?sslmode=require&password=***",
        ),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("nonsense://:secret@", "nonsense://:***@"),
        ("sqlite:////data/a:b@c.db", "sqlite:////data/a:b@c.db"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@pytest.mark.faults
def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text("trials: 64\n" * 100)
    with pytest.raises(UserError, match=r"study\.db: file is not a database; name another file"):
        open_storage(f"sqlite:///{path}")
    assert path.read_text().startswith("trials: 64")


AS_NOBODY = """
if os.getuid() == 0:  # root may write everywhere
    os.setgid(65534)
    os.setuid(65534)
try:
    open_storage(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user reaches; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="mapdistill_storage_", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


@pytest.mark.faults
def test_a_folder_or_file_that_cannot_be_written(open_folder: Path) -> None:
    path = open_folder / "study.db"
    open_storage(f"sqlite:///{path}").close()
    (open_folder / "study.db.lock").chmod(0o666)
    path.chmod(0o444)
    (said,) = outputs([start(AS_NOBODY, f"sqlite:///{path}")])
    assert re.search(r"study\.db: attempt to write a readonly database; make it writable \(chmod u\+w /tmp/", said), (
        said
    )
    open_folder.chmod(0o555)
    (said,) = outputs([start(AS_NOBODY, f"sqlite:///{path}")])
    assert f"folder {open_folder} cannot be written; name a file in one that can" in said
    (said,) = outputs([start(AS_NOBODY, f"sqlite:///{open_folder}/below/study.db")])
    assert f"{open_folder}/below: Permission denied; name a file in a folder that can be written" in said


@pytest.mark.faults
def test_tables_of_another_optuna(make_url: MakeUrl) -> None:
    url = make_url("old")
    storage = open_storage(url)
    study_engine = storage._rdb.engine
    with study_engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    storage.close()
    with pytest.raises(
        UserError, match=r"its tables are not those of this Optuna version: .*no longer compatible.*; or name another"
    ):
        open_storage(url)


def test_missing_psycopg() -> None:
    code = """
sys.modules["psycopg"] = None  # as if it were not installed
try:
    open_storage("postgresql://me:secret@127.0.0.1/db")
except ValueError as error:
    print(error)
"""
    (said,) = outputs([start(code)])
    assert "search.storage=postgresql://me:***@127.0.0.1/db: needs psycopg (" in said
    assert said.endswith("; pip install 'mapdistill[postgresql]'\n")


@pytest.mark.faults
def test_servers_that_refuse(postgres: Cluster) -> None:
    good = postgres.url("good")
    password = PASSWORD.replace(" ", "%20")
    for url, message in (
        (
            good.replace(password, "wrong"),
            "password authentication failed for user .*; correct it in the URL, in ~/.pgpass",
        ),
        (good.replace("/good", "/missing"), 'database "missing" does not exist; create it with createdb'),
        (
            good.replace(str(postgres.port), str(free_port())),
            "[Cc]onnection refused.*; start the server, or correct host",
        ),
        (f"{good}?sslmode=maybe", 'invalid sslmode value: "maybe".*; '),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_storage(url)
        assert str(caught.value).startswith(f"search.storage={hide_password(url)}: ")
        assert "\n" not in str(caught.value)
        assert "wrong" not in str(caught.value)
        assert PASSWORD not in str(caught.value)


def test_a_user_who_may_not_create_tables(postgres: Cluster) -> None:
    postgres.url("guarded")
    with postgres.connect("guarded") as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # the default since PostgreSQL 15
        connection.execute("CREATE USER guest PASSWORD 'guest'")
    with pytest.raises(UserError, match=r"permission denied for schema public.*; let the URL's user own the database"):
        open_storage(f"postgresql://guest:guest@127.0.0.1:{postgres.port}/guarded")


def error_of(call: Callable[[], object]) -> Exception:
    """What the call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.faults
def test_a_server_that_restarts(postgres: Cluster) -> None:
    storage = open_storage(postgres.url("restarts"))
    study = optuna.create_study(storage=storage.optuna, study_name="one")
    study.tell(study.ask(), 1.0)

    def locked(call: Callable[[], object]) -> None:
        with storage.lock(5):
            call()

    def fail_while_it_is_down() -> None:
        postgres.stop()
        try:
            study.ask()
        finally:
            postgres.start()

    postgres.stop()
    try:
        errors = [error_of(call) for call in (study.ask, lambda: study.user_attrs, lambda: locked(print))]
    finally:
        postgres.start()
    study.tell(study.ask(), 2.0)
    errors += [error_of(lambda: locked(postgres.restart)), error_of(lambda: locked(fail_while_it_is_down))]
    assert all(map(transient, errors)), errors
    locked(lambda: study.tell(study.ask(), 3.0))
    postgres.restart()
    study.tell(study.ask(), 4.0)  # nobody asked while it was down, so nobody notices
    assert [trial.value for trial in study.trials] == [1.0, 2.0, 3.0, 4.0]
    storage.close()


@pytest.mark.faults
def test_a_lock_whose_connection_is_ended(postgres: Cluster) -> None:
    url = postgres.url("ended")
    ours, others = open_storage(url), open_storage(url)

    def lose_it() -> None:
        with ours.lock(), postgres.connect("ended") as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
            with others.lock(5):
                pass

    error = error_of(lose_it)
    assert transient(error), error
    with ours.lock(5), pytest.raises(UserError, match="was not free"), others.lock(0.1):
        pass
    ours.close()
    others.close()


def test_the_lock_outlives_limits_of_the_server(postgres: Cluster) -> None:
    url = postgres.url("limits")
    with postgres.connect("limits") as admin:
        for limit in ("statement_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"):
            admin.execute(f"ALTER DATABASE limits SET {limit} = '1s'")
    ours, others = open_storage(url), open_storage(url)
    with ours.lock():
        waiter = threading.Thread(target=lambda: others.lock(30).__enter__())
        waiter.start()
        with postgres.connect("postgres") as watcher:

            def locks() -> int:
                asked = "SELECT count(*) FROM pg_locks WHERE (classid::int8 << 32) + objid::int8 = %s"
                return watcher.execute(asked, [LOCK_KEY]).fetchone()[0]

            until = time.monotonic() + 30
            while locks() < 2:  # the waiter has yet to connect
                assert time.monotonic() < until
            time.sleep(2.5)
            assert locks() == 2, "one holds, one waits"
        assert waiter.is_alive()
    waiter.join(20)
    ours.close()
    others.close()


@pytest.mark.faults
def test_a_locked_sqlite_file_is_transient_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.db"
    storage = open_storage(f"sqlite:///{path}")
    with storage._rdb.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 60_000
    storage.close()
    monkeypatch.setattr("ga.study.storage.BUSY_TIMEOUT_S", 0.1)
    storage = open_storage(f"sqlite:///{path}")
    study = optuna.create_study(storage=storage.optuna, study_name="one")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Exception, match="commit") as caught:
        study.ask()
    assert transient(caught.value), caught.value
    other.execute("ROLLBACK")
    study.ask()
    other.execute("DROP TABLE trials")
    other.close()
    with pytest.raises(Exception, match="commit") as caught:
        study.ask()
    assert not transient(caught.value), caught.value
    storage.close()


@pytest.mark.faults
def test_a_sqlite_file_that_is_locked_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Waited for, and said; after a minute the error names no other file, in which a search would begin anew."""
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}"
    open_storage(url).close()
    monkeypatch.setattr("ga.study.storage.QUIET_S", 0.1)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(1, lambda: other.execute("ROLLBACK"))
    release.start()
    open_storage(url).close()
    release.join()
    assert capsys.readouterr().err == f"search.storage={url} is locked; waiting for 60 s\n"

    monkeypatch.setattr("ga.study.storage.BUSY_TIMEOUT_S", 0.2)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="database is locked; another process has locked it: end that") as caught:
        open_storage(url)
    other.close()
    assert "name another" not in str(caught.value)
    open_storage(url).close()


@pytest.mark.parametrize(
    "error", [KeyError("x"), UserError("x"), OSError(111, "Connection refused"), ValueError("locked")]
)
def test_other_errors_are_not_transient(error: Exception) -> None:
    assert not transient(error)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, no_flock: None) -> None:
    with pytest.raises(UserError, match=r"has no file locks, .*; name a file on another one .* or a PostgreSQL server"):
        open_storage(f"sqlite:///{tmp_path}/study.db")
