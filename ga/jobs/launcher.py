"""One proxy job is one start of the deepspeed launcher: its command line, its environment, its processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.nodes import read_text
from engine.errors import UserError
from engine.records.processes import boot_id, look_up, running_processes
from ga.config import Launcher
from ga.jobs.slots import Placement

MARKER = "MAPDISTILL_JOB"
"""Environment variable of every process of a job: the absolute path of the job's directory."""
COMMAND, LOG, SESSION, EXPORTS = "cmd.txt", "output.log", "session.json", "deepspeed_env"
"""Files of a job's directory that are written here."""

_COMPILE_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
"""Variables of the driver, if it has them, that are none of its jobs': srun would hand them to every rank."""
_LOOK_EVERY_S = 0.02
_KILLED_WITHIN_S = 30.0


def command(
    placement: Placement,
    *,
    script: str,
    arguments: Sequence[str],
    port: int,
    hostfile: Path | None,
    launcher: Launcher,
    python: str,
) -> list[str]:
    """Returns the deepspeed command line, word by word, for Popen without a shell.

    hostfile: for jobs on other hosts; with `openmpi` one that names the hosts of this placement only
    (`placement.hostfile`), because DeepSpeed then takes all of them. python: the interpreter beside which deepspeed is
    installed.
    """
    deepspeed = str(Path(python).with_name("deepspeed"))
    if placement.is_local:
        # Without --hostfile DeepSpeed would read /job/hostfile where that exists, and go by ssh.
        words = ["--hostfile", os.devnull]
        if placement.on_cpu:  # --include knows one device per NUMA node only
            words += ["--num_accelerators", str(placement.world_size)]
        else:
            words += ["--include", str(placement)]
    else:
        assert hostfile is not None
        words = ["--hostfile", str(hostfile), "--launcher", launcher]
        if launcher != "openmpi":  # refuses --include
            words += ["--include", str(placement)]
        if launcher == "slurm":  # compute nodes may refuse ssh, which would only be asked for an address
            words += ["--no_ssh_check", "--master_addr", placement.hosts[0]]
        if len(placement.hosts) == 1:
            words += ["--force_multi"]  # or the ranks start on this machine
    return [deepspeed, "--quiet", *words, "--master_port", str(port), script, *arguments]


def environment(
    placement: Placement, *, job_dir: Path, base: Mapping[str, str], launcher: Launcher, port: int
) -> dict[str, str]:
    """Returns the variables to add to `base`, the driver's own environment. What the user has set there wins, but for
    the place where the ranks meet, which every job has to itself.

    launcher, port: as for `command`. srun and mpirun start the ranks without DeepSpeed's --master_addr and
    --master_port, so that they learn these from their environment (engine/ranks/environment.py). Compile caches get a
    folder per placement, so that jobs side by side do not write one file; compiled C++ extensions
    (TORCH_EXTENSIONS_DIR) stay shared: they take minutes to build, under a lock.
    """
    job_dir = job_dir.resolve()
    added = {MARKER: str(job_dir)}
    home = Path(base.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapdistill"
    host = socket.gethostname() if placement.is_local else ""  # homes may be shared between machines
    for key, folder in _COMPILE_CACHES.items():
        added[key] = str(Path(base.get(key) or home / folder) / host / placement.name)
    if placement.on_cpu:
        cores = len(os.sched_getaffinity(0)) // (placement.jobs_on_host * placement.world_size)
        added["DS_ACCELERATOR"] = base.get("DS_ACCELERATOR") or "cpu"
        if placement.is_local or base.get("OMP_NUM_THREADS"):  # other hosts divide their own cores
            added["OMP_NUM_THREADS"] = base.get("OMP_NUM_THREADS") or str(max(1, cores))
    if not placement.is_local:
        added["DS_ENV_FILE"] = str(job_dir / EXPORTS)
        if launcher != "pdsh":
            added |= {"MASTER_ADDR": placement.hosts[0], "MASTER_PORT": str(port)}
    return added


@dataclass(frozen=True)
class Session:
    """Tells a job's processes from all others, also for a later driver."""

    id: int
    """Process id of the launcher, and session id of all that it starts."""
    started: int
    """Start of the launcher, in clock ticks after boot."""
    boot: str
    """Kernel's id of that boot: another machine, or this one after a reboot, has another."""
    job_dir: str

    @staticmethod
    def read(job_dir: Path) -> Session | None:
        """Returns the session of the last start in that directory; None where none is (wholly) written."""
        try:
            return Session(**json.loads((job_dir / SESSION).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Job:
    """A started job. `stop` must be called in the end, also after the launcher has exited: ranks outlive it."""

    def __init__(self, process: subprocess.Popen[bytes], job_dir: Path) -> None:
        found = look_up(process.pid, zombies=True)
        assert found is not None  # a child that was not waited for is at least a zombie
        self.session = Session(process.pid, found.started, boot_id(), str(job_dir))
        self._process = process
        self._code: int | None = None

    @classmethod
    def start(cls, words: Sequence[str], *, job_dir: Path, added: Mapping[str, str], cwd: Path) -> Job:
        """Starts `words` in `cwd` with the environment variables `added`; output goes to job_dir/output.log.

        cmd.txt is there before the job is. The log of an earlier start in the same directory is kept under
        superseded-output.log. Raises UserError when the command cannot be started, and OSError when the
        directory cannot be written.
        """
        job_dir = job_dir.resolve()
        job_dir.mkdir(parents=True, exist_ok=True)
        log = job_dir / LOG
        if log.exists():
            log.replace(log.with_name(f"superseded-{LOG}"))
        (job_dir / SESSION).unlink(missing_ok=True)
        (job_dir / COMMAND).write_text(_pasteable_command(words, added, cwd), encoding="utf-8")
        if "DS_ENV_FILE" in added:
            _write_exports(Path(added["DS_ENV_FILE"]), added, cwd)
        inherited = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
        env = {**inherited, **added, MARKER: str(job_dir)}
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    list(words),
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{words[0]} cannot be started: {error}") from None
        job = cls(process, job_dir)
        try:
            (job_dir / SESSION).write_text(json.dumps(asdict(job.session)) + "\n", encoding="utf-8")
        except OSError as error:  # a full disk: a job that nobody could find again must not go on
            job.stop(0.0)
            raise UserError(f"{job_dir / SESSION} cannot be written: {error}") from None
        return job

    def poll(self) -> int | None:
        """Returns the launcher's exit code (minus the signal that ended it), None while it runs."""
        if self._code is None:
            # Not waited for before `stop`: the zombie keeps its id, so that no stranger's session can have it.
            info = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                self._code = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        return self._code

    def stop(self, grace_s: float) -> int:
        """Ends every process of the job: SIGTERM, up to grace_s seconds to end, SIGKILL until none is left. Returns how
        many there were. Jobs on other hosts need seconds of grace: their launcher ends the remote ranks.

        Raises RuntimeError when processes survive SIGKILL (stuck in a driver or file system).
        """
        if self._process.returncode is not None:
            return 0  # stopped before
        ended = _end_processes(lambda: [p.pid for p in running_processes() if p.session == self.session.id], grace_s)
        self._code = self._process.wait()
        return ended


def kill_session(session: Session, *, grace_s: float = 0.0) -> int:
    """Ends what is left of a job whose driver died, and returns how many processes that were.

    A process is the job's when its session has that id, its launcher (if it still runs) has that start time, it did not
    start before it, and its environment names the job's directory: a recycled id cannot hit a stranger. Give seconds of
    grace for jobs on other hosts. Raises RuntimeError when processes survive SIGKILL.
    """
    if session.boot != boot_id():
        return 0
    return _end_processes(lambda: _session_processes(session), grace_s)


def end_lost_job(job_dir: Path, *, grace_s: float = 0.0) -> int:
    """Ends what is left of the last start in that directory, and returns how many processes that were. Where the
    driver died before it wrote session.json, the environment alone identifies the job: no process outside it has
    this variable."""
    job_dir = job_dir.resolve()
    session = Session.read(job_dir)
    if session is not None:
        return kill_session(session, grace_s=grace_s)
    return _end_processes(lambda: [p.pid for p in running_processes() if _is_marked(p.pid, str(job_dir))], grace_s)


def _session_processes(session: Session) -> list[int]:
    leader = look_up(session.id, zombies=True)
    if leader is not None and leader.started != session.started:
        return []
    return [
        process.pid
        for process in running_processes()
        if process.session == session.id
        and process.started >= session.started
        and _is_marked(process.pid, session.job_dir)
    ]


def _is_marked(pid: int, job_dir: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False
    return os.fsencode(f"{MARKER}={job_dir}") in variables


def _end_processes(members: Callable[[], list[int]], grace_s: float) -> int:
    """Ends the processes that `members` lists until it lists none; returns how many they were. Raises RuntimeError
    when some survive SIGKILL."""
    seen = set(left := members())
    if grace_s > 0:
        _send_signal(left, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while (left := members()) and time.monotonic() < deadline:
            seen.update(left)
            time.sleep(_LOOK_EVERY_S)
    deadline = time.monotonic() + _KILLED_WITHIN_S
    while left := members():  # again and again: one may have forked since it was listed
        seen.update(left)
        _send_signal(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} still run {_KILLED_WITHIN_S:.0f} s after SIGKILL")
        time.sleep(_LOOK_EVERY_S)
    return len(seen)


def _send_signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _pasteable_command(words: Sequence[str], added: Mapping[str, str], cwd: Path) -> str:
    """Returns the command line for a user's shell, without the marker: what is started by hand must not be taken for
    a lost job."""
    exports = [f"export {key}={shlex.quote(value)}" for key, value in sorted(added.items()) if key != MARKER]
    return "\n".join([f"cd {shlex.quote(str(cwd.resolve()))}", *exports, shlex.join(words)]) + "\n"


def _write_exports(path: Path, added: Mapping[str, str], cwd: Path) -> None:
    """Writes what DeepSpeed passes on to other hosts: the user's own .deepspeed_env files, whose place this one
    takes, and what is added here."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines: list[str] = []
    for folder in (Path.home(), cwd):  # where DeepSpeed looks; an absolute name wins over the folder
        if (folder / name).is_file():
            lines += [line for line in read_text(folder / name).splitlines() if line.strip()]
    lines += [f"{key}={value}" for key, value in added.items() if key != "DS_ENV_FILE"]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
