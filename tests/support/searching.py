"""Starts searches over a tiny world, with real jobs or with stand-ins of them, and looks at what they left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import pytest
from fork_server import hear_signals
from launching import ROOT, environment, write_ds_config
from tiny_world import TinyWorld

from engine.records.records import read_records
from ga.jobs.launcher import MARKER
from ga.study.evaluations import Evaluation, read_history
from ga.study.storage import open_storage

YARDSTICK = f"{{{', '.join(f'{task}: {{start: 0.4, teacher: 0.95}}' for task in ('SST-2', 'MRPC', 'STS-B'))}}}"
"""As given by a user."""
STAND_IN_DRIVER = "tests/support/stand_in_driver.py"


@dataclass
class SearchRun:
    """A search in a folder; the same object can be started again."""

    output_dir: Path
    argv: list[str] = field(default_factory=list)
    storage: str | None = None
    script: str = "launch/search.py"
    told: dict[str, object] = field(default_factory=dict)
    """What goes otherwise than well in stand-ins of jobs (stand_in_proxy.py)."""

    def command(self, *more: str) -> list[str]:
        words = [sys.executable, self.script, "--output_dir", str(self.output_dir), *self.argv, *more]
        return words if self.storage is None else [*words, "--search.storage", self.storage]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*more),
            cwd=ROOT,
            env=environment() | {"STAND_IN": json.dumps(self.told)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hear_signals,
        )

    def finish(self, *more: str, expect: int = 0) -> str:
        return finish(self.start(*more), expect=expect)

    def finish_here(self, *more: str, expect: int = 0) -> str:
        """As `finish` with stand-ins of jobs, in this process, which has imported everything."""
        from stand_in_driver import StandInPool, search_main

        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
            patch.setattr("ga.search.JobPool", StandInPool)
            patch.setenv("DS_ACCELERATOR", "cpu")
            patch.setenv("STAND_IN", json.dumps(self.told))
            code = search_main(self.command(*more)[2:])
        assert code == expect, f"exit {code}, expected {expect}:\n{output.getvalue()[-6000:]}"
        return output.getvalue()

    def evaluations(self) -> list[Evaluation]:
        storage = open_storage(self.storage or f"sqlite:///{self.output_dir / 'study.db'}")
        try:
            return read_history(optuna.load_study(storage=storage.optuna, study_name=self.output_dir.name))
        finally:
            storage.close()

    def folders(self) -> list[Path]:
        """Of the jobs that evaluated the search's trials."""
        return sorted((self.output_dir / "trials").iterdir())

    def results(self) -> Counter[str]:
        """genome -> how often any job has recorded a result of it."""
        found: Counter[str] = Counter()
        for records in (self.output_dir / "trials").glob("*/records.jsonl"):
            found.update(record["genome"] for record in read_records(records) if record["kind"] == "result")
        return found

    def job_processes(self) -> list[int]:
        """Processes of jobs in this folder, whoever started them."""
        prefix = os.fsencode(f"{MARKER}={self.output_dir.resolve()}")
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(variable.startswith(prefix) for variable in variables):
                    found.append(int(name))
        return found


def finish(process: subprocess.Popen[str], *, expect: int = 0) -> str:
    """The output of a driver that must end with that exit code."""
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == expect, f"exit {process.returncode}, expected {expect}:\n{output[-6000:]}"
    return output


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """While the process runs."""
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, f"ended early:\n{process.stdout.read()[-4000:] if process.stdout else ''}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def make_tiny_search(
    output_dir: Path, world: TinyWorld, glue: Path, *, storage: str | None = None, **settings: object
) -> SearchRun:
    """Over 4 x 32 -> 2 x 16, six steps, fp32. settings: of the search section, or section__key."""
    values: dict[str, object] = {
        "deepspeed_config": write_ds_config(
            output_dir.with_name(f"ds {output_dir.name}"), zero_optimization={"stage": 0}
        ),
        "teacher.path": world.teacher,
        "student.layers": 2,
        "student.hidden_size": 16,
        "data.path": world.corpus,
        "task.data_dir": glue,
        "train.global_batch": 8,
        "train.warmup_steps": 2,
        "proxy.steps": 6,
        "proxy.yardstick": YARDSTICK,  # measuring it takes two jobs
    }
    for key, value in settings.items():
        values[key.replace("__", ".") if "__" in key else f"search.{key}"] = value
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return SearchRun(output_dir, argv, storage)


@pytest.fixture
def make_search(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> Callable[..., SearchRun]:
    """make_search(name, storage=…, **settings): make_tiny_search in tmp_path, with real jobs."""

    def make(name: str, **settings: object) -> SearchRun:
        return make_tiny_search(tmp_path / name, tiny_world, glue, **settings)

    return make


@pytest.fixture
def make_stand_in_search(make_search: Callable[..., SearchRun]) -> Callable[..., SearchRun]:
    """As make_search, with jobs that train nothing. told: what goes wrong in them."""

    def make(name: str, *, told: dict[str, object] | None = None, **settings: object) -> SearchRun:
        return replace(make_search(name, **settings), script=STAND_IN_DRIVER, told=told or {})

    return make
