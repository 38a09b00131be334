"""Proxy jobs side by side: each on slots of its own, in a folder of its own, with a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.hostfile import parse_hostfile
from engine.config.places import SHIPPED
from engine.config.proxy import ProxyJobConfig
from engine.errors import UserError
from engine.records.run_dir import RunDir, as_yaml
from ga.config import Launcher
from ga.jobs.launcher import LOG, Job, command, environment
from ga.jobs.outcome import JobReport, read_job
from ga.jobs.slots import Placement, free_port, plan_slots

SCRIPT = SHIPPED / "launch" / "proxy.py"
HOSTFILE = "hostfile"
LAUNCHED_BY: dict[Launcher, str] = {"pdsh": "pdsh", "openmpi": "ompi_info", "slurm": "sinfo"}
"""The command that DeepSpeed looks for."""
NO_GPU = ("-1", "NoDevFiles")
"""CUDA_VISIBLE_DEVICES of a user, or of Slurm, that means none."""
LOCAL_GRACE_S, REMOTE_GRACE_S = 10.0, 30.0
"""Seconds between SIGTERM and SIGKILL; the launcher of a job on other hosts needs some to end its ranks there."""


def find_placements(
    *, hostfile: str | None, local_slots: int | None, slots_per_job: int, launcher: Launcher
) -> list[Placement]:
    """Returns where jobs can run side by side. Raises UserError."""
    hosts = None if hostfile is None else parse_hostfile(Path(hostfile))
    gpus = visible_gpus()
    devices: int | Sequence[int] = gpus if gpus else slots_per_job
    if local_slots is not None:
        if gpus and local_slots > len(gpus):
            raise UserError(f"search.local_slots={local_slots}: this machine has {len(gpus)} visible GPUs")
        devices = gpus[:local_slots] if gpus else local_slots
    placements = plan_slots(
        hosts, local_devices=devices, slots_per_job=slots_per_job, launcher=launcher, on_cpu=not gpus
    )
    if shutil.which(LAUNCHED_BY[launcher]) is None and not all(placement.is_local for placement in placements):
        raise UserError(
            f"search.launcher={launcher!r}: this machine has no {LAUNCHED_BY[launcher]}, which DeepSpeed needs "
            f"for {launcher}; install it, or name another of {', '.join(LAUNCHED_BY)}"
        )
    return placements


def visible_gpus() -> list[int]:
    """Returns the ids of the CUDA devices that this process may use, found without torch; none when jobs compute on
    the CPU."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(count))
    if visible.strip() in NO_GPU:
        return []
    ids = [word.strip() for word in visible.split(",") if word.strip()]
    if not all(word.isdigit() for word in ids):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible!r}: write device numbers, e.g. 0,1, not names")
    return [int(word) for word in ids if int(word) < count]


@dataclass
class Running:
    """A job that was started."""

    placement: Placement
    folder: Path
    genomes: tuple[str, ...]
    job: Job
    began: float
    """Start of the job, in seconds of time.monotonic()."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def grace_s(self) -> float:
        return LOCAL_GRACE_S if self.placement.is_local else REMOTE_GRACE_S


class JobPool:
    """The jobs of one driver."""

    def __init__(
        self,
        placements: Sequence[Placement],
        *,
        launcher: Launcher,
        hostfile: Path | None,
        limit_s: float,
        stand_in: Sequence[str] = (),
    ) -> None:
        """Takes the placements of the jobs and their time limit. stand_in: for tests, a program that is given the
        launcher's command line and takes its place."""
        self.placements = tuple(placements)
        self.running: list[Running] = []
        self._launcher, self._hostfile, self._limit_s = launcher, hostfile, limit_s
        self._stand_in = tuple(stand_in)

    @property
    def free(self) -> list[Placement]:
        taken = {running.placement for running in self.running}
        return [placement for placement in self.placements if placement not in taken]

    def words(self, placement: Placement, folder: Path, port: int) -> list[str]:
        """Returns the command line of a job in `folder` whose ranks meet at `port`."""
        hostfile = self._hostfile
        if not placement.is_local and self._launcher == "openmpi":
            hostfile = folder / HOSTFILE
        words = command(
            placement,
            script=str(SCRIPT),
            arguments=["--config", str(RunDir(folder).config)],
            port=port,
            hostfile=hostfile,
            launcher=self._launcher,
            python=sys.executable,
        )
        return [*self._stand_in, *words]

    def start(self, placement: Placement, config: ProxyJobConfig) -> Running:
        """Starts a job in config.output_dir. Raises UserError when the launcher or the folder cannot be used."""
        folder = Path(config.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            RunDir(folder).config.write_text(as_yaml(config), encoding="utf-8")
            if not placement.is_local:
                (folder / HOSTFILE).write_text(placement.hostfile, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}") from None
        port = free_port()
        added = environment(placement, job_dir=folder, base=os.environ, launcher=self._launcher, port=port)
        job = Job.start(self.words(placement, folder, port), job_dir=folder, added=added, cwd=Path.cwd())
        running = Running(placement, folder, tuple(config.genomes), job, time.monotonic())
        self.running.append(running)
        return running

    def finished(self) -> Iterator[tuple[Running, JobReport]]:
        """Ends the jobs that have exited since the last call, or are late, and yields each with its report, one by
        one, because ending one may take its grace time: its processes are gone then, its slots free."""
        for running in list(self.running):
            late = running.seconds > self._limit_s
            if running.job.poll() is not None or late:
                yield running, self.end(running, timed_out=running.job.poll() is None)

    def end_all(self) -> list[tuple[Running, JobReport]]:
        """Ends them all in the time of one."""
        for running in self.running:
            _signal(running, signal.SIGTERM)
        return [(running, self.end(running)) for running in list(self.running)]

    def kill(self) -> None:
        """Sends SIGKILL to all jobs at once; `end` still has to follow."""
        for running in self.running:
            _signal(running, signal.SIGKILL)

    def end(self, running: Running, *, timed_out: bool = False) -> JobReport:
        """Ends a job's processes and reads what it has recorded."""
        code = running.job.poll()
        running.job.stop(running.grace_s)
        self.running.remove(running)
        return read_job(
            running.folder / LOG,
            RunDir(running.folder).records,
            genomes=running.genomes,
            exit_code=code,
            timed_out=timed_out,
        )


def _signal(running: Running, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.job.session.id, number)
