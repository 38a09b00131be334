"""Several hosts on this machine: Linux namespaces on a bridge, with an sshd in each, for the real launchers.

Each host has its own network, process ids, name, /dev/shm, /run, /etc/hosts and `local` folder; everything else of the
file system is shared, like a cluster's network storage. Processes of one host see each other, and nothing of the other
hosts or of this machine: DeepSpeed's `pkill -f` on a host ends what runs in that host only.

The bridge, too, lives in a namespace of its own. So nothing is left on this machine once the processes that hold the
namespaces are gone, and these end when their maker does, however it ended: they read a pipe of its.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
from launching import ROOT, Run, environment, finished, free_port, kill_session

LOGIN = "login"
"""A host that is in no hostfile: where the launcher runs."""
INTERFACE = "eth0"
NEEDED = ("ip", "unshare", "nsenter", "hostname", "sshd", "ssh", "ssh-keygen", "pdsh")
PREFIX = "mapdistill_hosts_"
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--mount-proc")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

# Arguments: name, hosts file, folder of its own, where that is seen. As process 1 it inherits and reaps every orphan.
_INIT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount --bind "$3" "$4"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
no_ipv6=/proc/sys/net/ipv6/conf/all/disable_ipv6
[ ! -e "$no_ipv6" ] || echo 1 >"$no_ipv6"
ip link set lo up
echo ready
exec >/dev/null 2>&1
read -r _ || exit 0
"""
_SWITCH = "ip link add name hub type bridge && ip link set hub up && echo ready && exec >/dev/null && read -r _"


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SBIN}")


@functools.cache
def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "hosts of network namespaces need root"
    missing = [program for program in NEEDED if which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing (apt-get install iproute2 util-linux openssh-server openssh-client pdsh)"
    trial = "ip link add name hub type bridge && ip link add name one type veth peer name two && mount -t tmpfs t /run"
    words = [str(which("unshare")), "--pid", "--fork", *_NAMESPACES, "sh", "-c", trial]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, env=_env())
    return None if done.returncode == 0 else f"namespaces cannot be made here: {done.stderr.strip()}"


def _env() -> dict[str, str]:
    env = environment()
    return env | {"PATH": f"{env['PATH']}:{_SBIN}"}


@dataclass
class _Host:
    """What holds a host's namespaces."""

    holder: subprocess.Popen[str]
    init: int
    """Process 1 of the host, by its number on this machine."""


class Hosts:
    """`with Hosts(2) as hosts`: worker-1 and worker-2 with sshd, and the host `login` with the launcher."""

    def __init__(self, count: int) -> None:
        self.names = tuple(f"worker-{i}" for i in range(1, count + 1))
        self._running: dict[str, _Host] = {}
        self._switch: _Host | None = None

    def __enter__(self) -> Hosts:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        _remove_left_over()
        started = int(psutil.Process().create_time())
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_{started}_", dir="/tmp"))
        try:
            self._write_files()
            self._switch = self._hold(_SWITCH, [], "--net")
            for name in (*self.names, LOGIN):
                self.boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes all, the last named first; where one of these fails, the others are done all the same."""
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.root, ignore_errors=True)
            if self._switch is not None:
                stack.callback(_end, self._switch)
            for name in self._running:
                stack.callback(self.kill, name)
        self._switch = None

    @property
    def hostfile(self) -> Path:
        return self.root / "hostfile"

    def write_hostfile(self, *, slots: int) -> None:
        """slots: ranks of each host."""
        self.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in self.names))

    @property
    def local(self) -> Path:
        """A folder that every host sees, each one its own."""
        return self.root / "local"

    def disk(self, host: str) -> Path:
        """What `host` sees as `local`, seen from outside. It outlives the host, like a disk."""
        return self.root / "disks" / host

    def address(self, host: str) -> str:
        return f"10.77.0.{self._number(host)}"

    @property
    def env(self) -> dict[str, str]:
        """For the launcher: our ssh first in PATH, and the file of what the ranks get."""
        env = _env()
        return env | {"PATH": f"{self.root / 'bin'}:{env['PATH']}", "DS_ENV_FILE": str(self.exports)}

    @property
    def exports(self) -> Path:
        """DeepSpeed's .deepspeed_env: environment of every rank on every host."""
        return self.root / "deepspeed_env"

    def resolve(self, host: str, name: str, address: str) -> None:
        """From now on `name` is `address` to `host`."""
        table = {n: self.address(n) for n in (*self.names, LOGIN)} | {name: address}
        lines = ["127.0.0.1 localhost", *(f"{where} {n}" for n, where in table.items())]
        self._table(host).write_text("".join(f"{line}\n" for line in lines))  # in place: it is mounted

    def boot(self, host: str) -> None:
        """Starts the host if it is down, and its sshd if that is down."""
        if host not in self._running:
            assert self._switch is not None
            self.resolve(host, host, self.address(host))
            self.disk(host).mkdir(parents=True, exist_ok=True)
            where = [host, str(self._table(host)), str(self.disk(host)), str(self.local)]
            new = self._hold(_INIT, where, *_NAMESPACES)
            self._running[host] = new
            port = self._port(host)
            # as a machine, it comes back with its old hardware address: its neighbours remember that for a minute
            its_end = ["name", INTERFACE, "address", f"02:00:00:00:00:{self._number(host):02x}", "netns", str(new.init)]
            self._ip(self._switch, "link", "add", "name", port, "type", "veth", "peer", *its_end)
            self._ip(self._switch, "link", "set", port, "master", "hub", "up")
            self._ip(new, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            self._ip(new, "link", "set", INTERFACE, "up")
        if host != LOGIN and not self._sshd(host):
            self._check(
                host, [str(which("sshd")), "-f", f"{self.root}/sshd_config", "-E", f"{self.root}/sshd_{host}.log"]
            )

    def stop_ssh(self, host: str) -> None:
        """No new connections; those that are there go on. `boot` starts it again."""
        for process in self._sshd(host):
            process.kill()
            process.wait(10)

    def kill(self, host: str) -> None:
        """SIGKILL to everything in the host, as a power failure: nobody is told, no connection is closed."""
        assert self._switch is not None
        with ExitStack() as stack:
            stack.callback(_end, self._running.pop(host))
            # first the cable, or the kernel would still send the dying sockets' last words
            with suppress(subprocess.CalledProcessError):
                self._ip(self._switch, "link", "delete", self._port(host))

    def disconnect(self, host: str) -> None:
        assert self._switch is not None
        self._ip(self._switch, "link", "set", self._port(host), "down")

    def connect(self, host: str) -> None:
        assert self._switch is not None
        self._ip(self._switch, "link", "set", self._port(host), "up")

    def start(
        self, host: str, argv: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """In that host, a session of its own; stdout and stderr come together through the pipe. env: beside `self.env`.

        End it with launching.kill_session: what it has started on other hosts goes on.
        """
        return subprocess.Popen(
            self._inside(host, argv, cwd),
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self, host: str, argv: Sequence[str], *, cwd: Path = ROOT, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(host, argv, cwd=cwd)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            kill_session(process)
        return subprocess.CompletedProcess(list(argv), process.returncode, output)

    def launch(self, run: Run, *more: str, launcher: str = "pdsh") -> subprocess.Popen[str]:
        """Starts the run's script on all hosts of the hostfile through `deepspeed`, which runs on `login`."""
        deepspeed = run.command(*more)
        script = deepspeed[deepspeed.index(f"launch/{run.script}") :]
        port = str(free_port())
        where = ["--hostfile", str(self.hostfile), "--launcher", launcher, "--master_port", port]
        env = {}
        if (
            launcher == "openmpi"
        ):  # mpirun starts the script itself, without DeepSpeed's --master_addr and --master_port
            exports = self.root / "deepspeed_env_openmpi"
            meeting = f"MASTER_ADDR={self.address(self.names[0])}\nMASTER_PORT={port}\n"
            exports.write_text(self.exports.read_text() + meeting)
            env = {"DS_ENV_FILE": str(exports), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return self.start(LOGIN, [str(Path(sys.executable).with_name("deepspeed")), *where, *script], env=env)

    def finish(self, run: Run, *more: str, launcher: str = "pdsh", expect: int = 0) -> str:
        """`launch`, waited for; nothing of it may be left on any host."""
        return finished(self.launch(run, *more, launcher=launcher), expect)

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs in the host, but for its process 1 and its sshd's listener."""
        init = self._running[host].init
        listener = {process.pid for process in self._sshd(host)}
        return [p for p in _in_namespace(_namespace(init)) if p.pid not in {init, *listener}]

    def assert_idle(self, within_s: float = 20) -> None:
        """Nothing runs in any host of the hostfile; sessions of sshd may take a moment to end."""
        until = time.monotonic() + within_s
        while left := [(name, p.pid, p.name()) for name in self.names for p in self.processes(name)]:
            if time.monotonic() > until:
                raise AssertionError(f"still there after {within_s:g} s: {left}")
            time.sleep(0.1)

    def ranks(self, host: str) -> list[psutil.Process]:
        """Python processes in the host that run a script of launch/."""
        found = []
        for process in self.processes(host):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if any(w.startswith("--local_rank=") for w in words) and "deepspeed.launcher.launch" not in words:
                    found.append(process)
        return found

    def _number(self, host: str) -> int:
        return (*self.names, LOGIN).index(host) + 1

    def _table(self, host: str) -> Path:
        return self.root / f"hosts_{host}"

    def _port(self, host: str) -> str:
        return f"to-{host}"

    def _sshd(self, host: str) -> list[psutil.Process]:
        """Listening; not the ones of each connection, which have other titles."""
        config = str(self.root / "sshd_config")
        found = []
        for process in _in_namespace(_namespace(self._running[host].init)):
            with suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if config in title and "sshd" in title:
                    found.append(process)
        return found

    def _inside(self, host: str, argv: Sequence[str], cwd: Path) -> list[str]:
        enter = [str(which("nsenter")), "--target", str(self._running[host].init)]
        return [*enter, "--net", "--uts", "--ipc", "--mount", "--pid", "--", "env", "-C", str(cwd), *argv]

    def _check(self, host: str, argv: Sequence[str]) -> None:
        done = self.run(host, argv)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(argv)} on {host}: exit {done.returncode}\n{done.stdout}")

    def _ip(self, where: _Host, *words: str) -> None:
        command = [str(which("nsenter")), "--target", str(where.init), "--net", "--", str(which("ip")), *words]
        subprocess.run(command, check=True, capture_output=True, timeout=30)

    def _hold(self, script: str, arguments: Sequence[str], *namespaces: str) -> _Host:
        """A process that keeps new namespaces alive until its standard input ends, which our end does too."""
        words = [str(which("unshare")), "--pid", "--fork", "--kill-child", *namespaces, "--", "bash", "-c", script]
        holder = subprocess.Popen(
            [*words, "init", *arguments],
            env=_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if line != "ready\n":
            holder.kill()
            raise RuntimeError(f"a host cannot be made: {line}{holder.stdout.read()}")
        (init,) = psutil.Process(holder.pid).children()
        return _Host(holder, init.pid)

    def _write_files(self) -> None:
        for folder in ("bin", "disks", "local"):
            (self.root / folder).mkdir()
        for key in ("host_key", "user_key"):
            words = [str(which("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.root / key)]
            subprocess.run(words, check=True, capture_output=True)
        texts = {
            "known_hosts": f"* {(self.root / 'host_key.pub').read_text()}",
            "ssh_config": f"""
                IdentityFile {self.root}/user_key
                IdentitiesOnly yes
                UserKnownHostsFile {self.root}/known_hosts
                GlobalKnownHostsFile /dev/null
                StrictHostKeyChecking yes
                LogLevel ERROR
                """,
            "sshd_config": f"""
                HostKey {self.root}/host_key
                AuthorizedKeysFile {self.root}/user_key.pub
                PidFile none
                StrictModes no
                UsePAM no
                PermitRootLogin yes
                PasswordAuthentication no
                KbdInteractiveAuthentication no
                MaxStartups 100
                ClientAliveInterval 5
                ClientAliveCountMax 2
                """,
            "bin/ssh": f'#!/bin/sh\nexec {which("ssh")} -F {self.root}/ssh_config "$@"\n',
        }
        for name, text in texts.items():
            (self.root / name).write_text(text)
        self.write_hostfile(slots=1)
        (self.root / "bin" / "ssh").chmod(0o755)
        wanted = ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
        exported = {name: value for name, value in self.env.items() if name in wanted}
        exported["GLOO_SOCKET_IFNAME"] = INTERFACE
        self.exports.write_text("".join(f"{name}={value}\n" for name, value in exported.items()))


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _in_namespace(wanted: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            if _namespace(process.pid) == wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end(host: _Host) -> None:
    """Process 1 takes its whole process namespace with it, and that its network."""
    assert host.holder.stdin is not None
    assert host.holder.stdout is not None
    with host.holder.stdin, host.holder.stdout:
        if host.holder.poll() is None:  # else another process may have the number of its child by now
            with suppress(ProcessLookupError):
                os.kill(host.init, signal.SIGKILL)
        host.holder.wait(30)


def _remove_left_over() -> None:
    """Folders whose maker was SIGKILLed; its hosts ended with it."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        pid, started = folder.name.removeprefix(PREFIX).split("_")[:2]
        with suppress(psutil.NoSuchProcess):
            if int(psutil.Process(int(pid)).create_time()) == int(started):
                continue
        shutil.rmtree(folder, ignore_errors=True)
