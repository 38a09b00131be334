"""A host's agent (engine/ranks/hosts/agent.py) at the other end of an ssh connection. No torch here."""

from __future__ import annotations

import contextlib
import inspect
import json
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import UserError
from engine.ranks.hosts import agent

CONNECT_S = 8
CLOSE_S = 1.0
_SSH_REMEDIES = {
    "permission denied": "ssh asks for a password: put your public key there (`ssh-copy-id {host}`)",
    "host key verification failed": "its key is not known here: run `ssh {host}` once by hand and compare the key",
    "connection refused": "no ssh server listens there: start it (`systemctl start ssh`), or give --ssh_port",
    "could not resolve hostname": "its name has no address here: add it to /etc/hosts or ~/.ssh/config",
    "timed out": "it is down, or the network to it is: look at its power, cable, address and firewall",
    "no route to host": "it is down, or the network to it is: look at its power, cable, address and firewall",
    "network is unreachable": "no route leads to it: look at its address and this machine's routes",
    "no such file or directory": "this Python ({python}) is not there: install the environment at the same path",
    "not found": "this Python ({python}) is not there: install the environment at the same path",
}


class HostError(Exception):
    """A host that does not answer as it should."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


class HostLink:
    """One ssh connection to an agent. `close_all` must be called in the end."""

    def __init__(self, host: str, *, env: Mapping[str, str], ssh_port: int | None) -> None:
        """Connects. env: variables for the agent and what it starts, as DeepSpeed's launcher would pass them on. Raises
        HostError where ssh cannot be started, and UserError where there is none."""
        assert not host.startswith("-")
        self.host = host
        source = inspect.getsource(agent)
        program = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable, "-c", source]
        options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=3", "ServerAliveCountMax=3"]
        words = ["ssh", "-T", *(word for option in options for word in ("-o", option))]
        words += ["-p", str(ssh_port)] if ssh_port is not None else []
        if shutil.which("ssh") is None:
            raise UserError(
                "there is no ssh in PATH, which launchers and this check reach other hosts with; install it"
            )
        try:
            self._ssh = subprocess.Popen(
                [*words, host, shlex.join(program)],  # the remote shell splits this text
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the check, which then closes its links
            )
        except OSError as error:
            raise HostError(
                f"ssh cannot be started here ({error})",
                "raise this machine's limits on open files (3 a host) and processes (`ulimit -Hn`, `ulimit -u`)",
            ) from error
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._complaints: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_out, self._read_err)]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self._ssh.stdout is not None
        for line in self._ssh.stdout:
            if line.startswith(agent.MARK):
                self._answers.put(line.removeprefix(agent.MARK))
        self._answers.put(None)

    def _read_err(self) -> None:
        assert self._ssh.stderr is not None
        self._complaints.extend(self._ssh.stderr)

    def ask(self, do: str, *, within_s: float, **arguments: Any) -> dict[str, Any]:
        """Returns the agent's answer. Raises HostError."""
        assert self._ssh.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: why stands in its complaints
            self._ssh.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._ssh.stdin.flush()
        try:
            line = self._answers.get(timeout=max(0.1, within_s))
        except queue.Empty:
            raise HostError(
                f"it does not answer ({do}, {within_s:.0f} s)", "look at its load, its disks and the network to it"
            ) from None
        if line is None:
            self._answers.put(None)
            raise self._why_it_ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why_it_ended(self) -> HostError:
        self._readers[1].join(timeout=2)
        lines = [line.strip() for line in self._complaints if line.strip()]
        what = lines[-1] if lines else "the connection was closed"
        for complaint, remedy in _SSH_REMEDIES.items():
            if complaint in what.lower():
                return HostError(what, remedy.format(host=self.host, python=sys.executable))
        return HostError(what, f"try `ssh {shlex.quote(self.host)} {shlex.quote(sys.executable)} --version`")

    def clock_offset(self, *, within_s: float) -> tuple[float, float]:
        """Returns the seconds by which its clock is ahead of this machine's, and how far off that may be."""
        best = (0.0, float("inf"))
        for _ in range(3):
            sent = time.time()
            now = float(self.ask("clock", within_s=within_s)["now"])
            received = time.time()
            best = min(best, (now - (sent + received) / 2, (received - sent) / 2), key=lambda offset: offset[1])
        return best

    def _hang_up(self) -> None:
        """Closes the agent's input: it ends when it has read this, and ssh then."""
        assert self._ssh.stdin is not None
        with contextlib.suppress(OSError):
            self._ssh.stdin.close()

    def _end(self, *, within_s: float) -> None:
        try:
            self._ssh.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()


def close_all(links: Iterable[HostLink]) -> None:
    """Ends each ssh, and with it the agent. They have CLOSE_S together, however many hang."""
    links = list(links)
    for link in links:
        link._hang_up()
    until = time.monotonic() + CLOSE_S
    for link in links:
        link._end(within_s=max(0.0, until - time.monotonic()))
