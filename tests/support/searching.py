"""Starts real searches over a tiny world, and looks at what they left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from launching import ROOT, environment, hear_signals

from engine.records.records import read_records
from ga.jobs.launcher import MARKER
from ga.study.evaluations import Evaluation, read_history
from ga.study.storage import open_storage


@dataclass
class SearchRun:
    """A search in a folder; the same object can be started again."""

    output_dir: Path
    argv: list[str] = field(default_factory=list)
    storage: str | None = None

    def command(self, *more: str) -> list[str]:
        words = [sys.executable, "launch/search.py", "--output_dir", str(self.output_dir), *self.argv, *more]
        return words if self.storage is None else [*words, "--search.storage", self.storage]

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*more),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hear_signals,
        )

    def finish(self, *more: str, expect: int = 0) -> str:
        return finish(self.start(*more), expect=expect)

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
        for folder in self.folders():
            records = folder / "records.jsonl"
            found.update(r["genome"] for r in read_records(records) if r["kind"] == "result") if records.exists() else 0
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
