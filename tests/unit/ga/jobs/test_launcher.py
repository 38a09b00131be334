"""The command line of every situation against tests/golden/search_commands (one word a line), and the processes of real
jobs: small Python programs that behave as launchers and ranks do."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT

from engine.errors import UserError
from ga.config import Launcher
from ga.jobs.launcher import MARKER, Job, Session, command, end_lost_job, environment, kill_session
from ga.jobs.slots import LOCAL, Placement, Slot

GOLDEN = ROOT / "tests" / "golden" / "search_commands"
ONE, TWO = Slot("worker-1", (0, 1, 2, 3)), Slot("worker-2", (0, 1, 2, 3))
SITUATIONS: dict[str, tuple[Placement, Launcher]] = {
    "one_local_cpu": (Placement((Slot(LOCAL, (1,)),), on_cpu=True), "pdsh"),
    "two_local_cpu_ranks": (Placement((Slot(LOCAL, (0, 1)),), on_cpu=True), "pdsh"),
    "one_local_gpu": (Placement((Slot(LOCAL, (3,)),)), "pdsh"),
    "several_local_gpus": (Placement((Slot(LOCAL, (2, 3)),)), "slurm"),
    "one_remote_host": (Placement((ONE,)), "pdsh"),
    "several_hosts": (Placement((ONE, TWO)), "pdsh"),
    "openmpi_one_host": (Placement((ONE,)), "openmpi"),
    "openmpi_several_hosts": (Placement((ONE, TWO)), "openmpi"),
    "slurm_one_host": (Placement((ONE,)), "slurm"),
    "slurm_several_hosts": (Placement((ONE, TWO)), "slurm"),
}

RANK = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
LAUNCHER = f"""
import subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}, f"rank{{i}}"]) for i in range(3)]
print("launcher speaks", flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("name", SITUATIONS)
def test_command_line(name: str) -> None:
    placement, launcher = SITUATIONS[name]
    words = command(
        placement,
        script="launch/proxy.py",
        arguments=["--config", "trials/00012/config.yaml", "--genomes", "0-3-6", "2-4-6", "--output_dir", "a folder"],
        port=29512,
        hostfile=None if placement.is_local else Path("trials/00012/hostfile"),
        launcher=launcher,
        python="/venv/bin/python3",
    )
    assert words == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_no_golden_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(SITUATIONS)


def test_environment_of_jobs_side_by_side(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    base = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    jobs = [Placement((Slot(LOCAL, (i,)),), on_cpu=True, jobs_on_host=2) for i in range(2)]
    first, second = (
        environment(job, job_dir=tmp_path / "00001", base=base, launcher="pdsh", port=29512) for job in jobs
    )
    for key in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert first[key] != second[key]
        assert first[key].startswith(str(tmp_path / "cache" / "mapdistill"))
    assert first["DS_ACCELERATOR"] == "cpu"
    assert first["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert first[MARKER] == str(tmp_path / "00001")
    assert "TORCH_EXTENSIONS_DIR" not in first
    assert "DS_ENV_FILE" not in first


def test_what_the_user_has_set_wins(tmp_path: Path) -> None:
    placement = Placement((Slot(LOCAL, (0,)),), on_cpu=True, jobs_on_host=2)
    base = {"OMP_NUM_THREADS": "7", "DS_ACCELERATOR": "xpu", "TRITON_CACHE_DIR": str(tmp_path / "mine")}
    added = environment(placement, job_dir=tmp_path, base=base, launcher="pdsh", port=29512)
    assert (added["OMP_NUM_THREADS"], added["DS_ACCELERATOR"]) == ("7", "xpu")
    assert added["TRITON_CACHE_DIR"].startswith(str(tmp_path / "mine"))


def test_gpus_and_other_hosts_choose_their_own_threads(tmp_path: Path) -> None:
    gpu = environment(Placement((Slot(LOCAL, (0,)),)), job_dir=tmp_path, base={}, launcher="pdsh", port=29512)
    assert not {"OMP_NUM_THREADS", "DS_ACCELERATOR"} & set(gpu)
    remote = environment(Placement((ONE,), on_cpu=True), job_dir=tmp_path, base={}, launcher="pdsh", port=29512)
    assert remote["DS_ACCELERATOR"] == "cpu"
    assert "OMP_NUM_THREADS" not in remote
    assert remote["DS_ENV_FILE"] == str(tmp_path / "deepspeed_env")


def test_ranks_of_srun_and_mpirun_learn_where_to_meet(tmp_path: Path) -> None:
    meet = {"MASTER_ADDR", "MASTER_PORT"}
    base = {"MASTER_ADDR": "worker-9", "MASTER_PORT": "29500"}  # the driver's own
    remote = Placement((TWO, ONE))
    launchers: tuple[Launcher, ...] = ("slurm", "openmpi")
    for launcher in launchers:
        added = environment(remote, job_dir=tmp_path, base=base, launcher=launcher, port=29512)
        assert (added["MASTER_ADDR"], added["MASTER_PORT"]) == ("worker-2", "29512")
        local = environment(Placement((Slot(LOCAL, (0,)),)), job_dir=tmp_path, base={}, launcher=launcher, port=29512)
        assert not meet & set(local)
    assert not meet & set(environment(remote, job_dir=tmp_path, base={}, launcher="pdsh", port=29512))


@pytest.fixture
def job_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "trials" / "00012"
    folder.mkdir(parents=True)
    yield folder
    for pid in marked(folder):  # whatever a failed test left
        os.kill(pid, signal.SIGKILL)


def marked(folder: Path) -> list[int]:
    """Found by another way than the launcher's: every process whose environment names the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{MARKER}={folder}".encode() in variables:
                found.append(int(entry.name))
    return found


def start(folder: Path, *, seconds: float = 600.0) -> Job:
    return Job.start([sys.executable, "-c", LAUNCHER, str(seconds)], job_dir=folder, added={}, cwd=folder)


def wait_until(ready: object, what: str) -> None:
    assert callable(ready)
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        time.sleep(0.01)


def start_with_ranks(folder: Path, *, seconds: float = 600.0) -> Job:
    job = start(folder, seconds=seconds)
    wait_until(lambda: all((folder / f"rank{i}").exists() for i in range(3)), "three ranks")
    return job


def test_stop_ends_ranks_that_ignore_sigterm(job_dir: Path) -> None:
    job = start_with_ranks(job_dir)
    assert job.poll() is None
    assert len(marked(job_dir)) == 4
    assert job.stop(grace_s=0.2) == 4
    assert marked(job_dir) == []
    assert job.poll() == -signal.SIGTERM
    assert job.stop(grace_s=0.2) == 0


def test_stop_finds_ranks_of_a_killed_launcher(job_dir: Path) -> None:
    job = start_with_ranks(job_dir)
    os.kill(job.session.id, signal.SIGKILL)
    wait_until(lambda: job.poll() is not None, "the launcher's end")
    assert job.poll() == -signal.SIGKILL
    assert Path(f"/proc/{job.session.id}").exists()  # its id cannot be given to another process yet
    assert len(marked(job_dir)) == 3
    assert job.stop(grace_s=0.0) == 3
    assert marked(job_dir) == []
    assert job.poll() == -signal.SIGKILL
    assert not Path(f"/proc/{job.session.id}").exists()


def test_stop_finds_ranks_of_a_launcher_that_exited_with_0(job_dir: Path) -> None:
    job = start_with_ranks(job_dir, seconds=0.0)
    wait_until(lambda: job.poll() is not None, "the launcher's end")
    assert job.poll() == 0
    assert job.stop(grace_s=0.0) == 3
    assert marked(job_dir) == []
    assert job.poll() == 0


def test_stop_lets_a_job_end_by_itself(job_dir: Path) -> None:
    polite = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); print(1, flush=True); "
    job = Job.start([sys.executable, "-c", polite + "time.sleep(600)"], job_dir=job_dir, added={}, cwd=job_dir)
    wait_until(lambda: (job_dir / "output.log").read_text() == "1\n", "its first line")
    assert job.stop(grace_s=20) == 1
    assert job.poll() == 4


def test_jobs_of_one_driver_do_not_hit_each_other(job_dir: Path) -> None:
    other_dir = job_dir.with_name("00013")
    job, other = start_with_ranks(job_dir), start_with_ranks(other_dir)
    job.stop(grace_s=0.0)
    assert len(marked(other_dir)) == 4
    other.stop(grace_s=0.0)
    assert marked(other_dir) == []


DRIVER = """
import pathlib, sys, time
from ga.jobs.launcher import Job
folder = pathlib.Path(sys.argv[1])
Job.start([sys.executable, "-c", sys.argv[2], "600"], job_dir=folder, added={}, cwd=folder)
time.sleep(600)
"""


@pytest.mark.parametrize("launcher_too", [False, True])
@pytest.mark.parametrize("session_written", [True, False])
def test_a_later_driver_ends_what_a_killed_one_left(job_dir: Path, launcher_too: bool, session_written: bool) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(job_dir), LAUNCHER])
    wait_until(lambda: all((job_dir / f"rank{i}").exists() for i in range(3)), "three ranks")
    wait_until(lambda: Session.read(job_dir) is not None, "session.json")
    driver.kill()
    driver.wait()
    session = Session.read(job_dir)
    assert session is not None
    if launcher_too:
        os.kill(session.id, signal.SIGKILL)
        wait_until(lambda: len(marked(job_dir)) == 3, "the launcher's end")
    if not session_written:
        (job_dir / "session.json").write_text('{"id": 12, "sta')
    assert end_lost_job(job_dir) == (3 if launcher_too else 4)
    assert marked(job_dir) == []
    assert end_lost_job(job_dir) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"started": 1},  # the id was given to a later launcher
        {"boot": "another machine"},
        {"job_dir": "/another/job"},
        {"id": os.getsid(0)},
        {"id": 2**22},  # no process has it
    ],
)
def test_a_recycled_id_never_hits_a_stranger(job_dir: Path, wrong: dict[str, int | str]) -> None:
    job = start_with_ranks(job_dir)
    assert kill_session(replace(job.session, **wrong)) == 0  # type: ignore[arg-type]
    assert len(marked(job_dir)) == 4
    job.stop(grace_s=0.0)
    assert kill_session(job.session) == 0


def test_files_of_a_job(job_dir: Path) -> None:
    added = {"GREETING": "two words", "DS_ACCELERATOR": "cpu", MARKER: str(job_dir)}
    words = [sys.executable, "-c", "import os; print(os.environ['GREETING'], os.getcwd())"]
    (job_dir / "output.log").write_text("of an earlier start\n")
    job = Job.start(words, job_dir=job_dir, added=added, cwd=job_dir.parent)
    wait_until(lambda: job.poll() is not None, "its end")
    assert job.stop(grace_s=0.0) == 0
    said = f"two words {job_dir.parent}\n"
    assert (job_dir / "output.log").read_text() == said
    assert (job_dir / "superseded-output.log").read_text() == "of an earlier start\n"
    assert json.loads((job_dir / "session.json").read_text())["id"] == job.session.id

    pasted = (job_dir / "cmd.txt").read_text()
    assert shlex.split(pasted.splitlines()[-1]) == words
    assert MARKER not in pasted  # or a later driver would end what the user runs by hand
    shell = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True, cwd="/")
    assert shell.stdout == said


def test_a_job_is_not_the_rank_that_its_driver_is(job_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-c", "import os; print(sorted(k for k in os.environ if 'RANK' in k or '_SIZE' in k))"]
    job = Job.start(words, job_dir=job_dir, added={}, cwd=job_dir)
    wait_until(lambda: job.poll() is not None, "its end")
    job.stop(grace_s=0.0)
    said = (job_dir / "output.log").read_text()
    assert said.startswith("[")
    assert not any(f"'{name}'" in said for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"))


def test_other_hosts_get_the_users_variables_and_the_jobs(
    job_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth1\n\n")
    added = environment(Placement((ONE,), on_cpu=True), job_dir=job_dir, base={}, launcher="openmpi", port=29512)
    job = Job.start(["true"], job_dir=job_dir, added=added, cwd=job_dir)
    job.stop(grace_s=0.0)
    lines = (job_dir / "deepspeed_env").read_text().splitlines()
    assert lines[0] == "GLOO_SOCKET_IFNAME=eth1"
    assert {"DS_ACCELERATOR=cpu", f"{MARKER}={job_dir}", "MASTER_ADDR=worker-1", "MASTER_PORT=29512"} < set(lines)
    assert all("=" in line for line in lines)  # DeepSpeed reads no other


def test_a_command_that_does_not_exist(job_dir: Path) -> None:
    with pytest.raises(UserError, match="deepspeed cannot be started"):
        Job.start(["/nowhere/deepspeed"], job_dir=job_dir, added={}, cwd=job_dir)


def test_a_job_that_nobody_could_find_again_is_ended(job_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(self: Path, text: str, encoding: str) -> int:
        if self.name == "session.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, encoding)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"session\.json cannot be written: .*No space left"):
        start(job_dir)
    assert marked(job_dir) == []
