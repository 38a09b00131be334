"""Starts the real scripts, through the real deepspeed launcher or as it would, and reads what they left."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import torch
from fork_server import ForkedStart, ForkServer, hear_signals
from safetensors.torch import load_file

from engine.records.records import read_records
from engine.records.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]

Launcher = Literal["forked", "real", "none"]
"""forked: from the fork server (tests/support/fork_server.py), several ranks as `deepspeed` starts them, one as plain
`python` does; with MAPDISTILL_LAUNCHER=real, through those. real: the `deepspeed` launcher. none: plain `python`."""
Started = subprocess.Popen[str] | ForkedStart


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT", "MASTER_ADDR")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    bin_dir = str(Path(sys.executable).parent)
    return env | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{bin_dir}{os.pathsep}{env['PATH']}"}


@functools.cache
def fork_server() -> ForkServer:
    """Started when the first test asks."""
    return ForkServer(environment(), ROOT)


@dataclass
class Run:
    """One start of a script of launch/ in a run directory; the same object can be started again."""

    output_dir: Path
    ranks: int = 1
    argv: list[str] = field(default_factory=list)
    launcher: Launcher = "forked"
    script: str = "distill.py"

    output: str = ""
    """Of the last `finish`."""

    def script_words(self, *more: str) -> list[str]:
        return [f"launch/{self.script}", "--output_dir", str(self.output_dir), *self.argv, *more]

    def command(self, *more: str) -> list[str]:
        """For a start of its own."""
        return command(self.script_words(*more), self.ranks, self.launcher)

    def start(self, *more: str, output: IO[str] | None = None) -> Started:
        """output: a file, for a start that says more than fits into a pipe that nobody reads."""
        return start(self.script_words(*more), self.ranks, self.launcher, output)

    def finish(self, *more: str, expect: int = 0) -> str:
        self.output = finished(self.start(*more), expect)
        return self.output

    def copied(self, folder: Path) -> Run:
        """The run as it lies on the disk, in another folder."""
        shutil.copytree(self.output_dir, folder)
        return replace(self, output_dir=folder)

    def rank_pids(self, launcher_pid: int) -> list[int]:
        """Pids of the rank processes, in the order of their ranks."""
        found = []
        for child in psutil.Process(launcher_pid).children(recursive=True):
            if child.name().startswith("rank ") and child.ppid() == launcher_pid:  # forked
                found.append((int(child.name()[5:]), child.pid))
            words = child.cmdline()
            local = [w for w in words if w.startswith("--local_rank=")]
            if local and f"launch/{self.script}" in words:
                found.append((int(local[0].partition("=")[2]), child.pid))
        return [pid for _, pid in sorted(found)]

    def wait_for_step(self, step: int, process: Started, *, within_s: float = 300) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if any(r["step"] >= step for r in self.steps()):
                return
            assert process.poll() is None, f"ended early:\n{process.stdout.read()[-4000:] if process.stdout else ''}"
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached")

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.output_dir)

    def records(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir.records
        return [r for r in read_records(path) if r["kind"] == kind] if path.is_file() else []

    def steps(self) -> list[dict[str, Any]]:
        return [r for r in self.records("step") if "total" in r]

    def curve(self, key: str = "total") -> list[float]:
        """The value of each step; of a step that was run twice, the later one."""
        return list({r["step"]: r[key] for r in self.steps()}.values())

    def student(self) -> dict[str, torch.Tensor]:
        return load_file(self.run_dir.student / "model.safetensors")

    def projections(self) -> dict[str, torch.Tensor]:
        return load_file(self.run_dir.student / "projections.safetensors")


def command(script: list[str], ranks: int = 1, launcher: Launcher = "forked") -> list[str]:
    """For a start of its own."""
    if launcher == "none" or (launcher == "forked" and ranks == 1):
        return [sys.executable, *script]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_accelerators", str(ranks), *script]


def start(script: list[str], ranks: int = 1, launcher: Launcher = "forked", output: IO[str] | None = None) -> Started:
    """A script with its arguments. output: as of `spawn`."""
    if launcher == "forked" and os.environ.get("MAPDISTILL_LAUNCHER") != "real":
        return fork_server().start(script, ranks=ranks, port=free_port(), env=environment(), output=output)
    return spawn(command(script, ranks, launcher), output)


def spawn(argv: list[str], output: IO[str] | None = None) -> subprocess.Popen[str]:
    """In a session of its own; stdout and stderr come together, through a pipe or into the file."""
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env=environment(),
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )


def finished(process: Started, expect: int) -> str:
    """Waits for the end, which must have that exit code; returns the output."""
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        kill_session(process)
    assert process.returncode == expect, f"exit {process.returncode}, expected {expect}:\n{output[-6000:]}"
    return output


def kill_session(process: Started) -> None:
    """Ranks outlive a killed launcher; they share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def write_ds_config(folder: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds.json"
    path.write_text(json.dumps(sections))
    return path
