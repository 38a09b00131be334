"""What launch/check_hosts.py runs on each host: it answers one JSON line with another, over one ssh connection.

Its source travels in the ssh command, so that it works where nothing of mapdistill is installed: the standard library
only, and nothing that needs this file to exist there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "@host "
"""Beginning of every answer: a shell's start-up files may print before it."""
COMPARED = ("torch", "deepspeed", "transformers")
"""Packages whose versions must be the same on all hosts."""

_listeners: list[socket.socket] = []


def code_hash(root: Path) -> str | None:
    """Returns a hash of the names and contents of all Python files of the engine; None where there is none."""
    files = sorted((root / "engine").rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12] if files else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _interfaces() -> dict[str, list[str]]:
    """Returns the IPv4 and IPv6 addresses of each interface that is up."""
    try:
        import psutil
    except ImportError:
        return {}
    families = (socket.AF_INET, socket.AF_INET6)
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def _own_name() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _addresses() -> list[str]:
    """Returns this host's addresses as DeepSpeed's launcher asks for them; it takes the first one."""
    try:
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def facts(*, root: str, cwd: str) -> dict[str, Any]:
    """Returns what decides whether this host can train with others. root: of this library. cwd: of the launcher."""
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in COMPARED},
        "code": code_hash(Path(root)),
        "has_cwd": os.path.isdir(cwd),
        "name": socket.gethostname(),
        "name_is": _own_name(),
        "addresses": _addresses(),
        "reached_at": (os.environ.get("SSH_CONNECTION", "").split() or [""] * 3)[2],
        "interfaces": _interfaces(),
        "gpus": 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else len(glob.glob("/dev/nvidia[0-9]*")),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


def clock() -> dict[str, float]:
    """Returns the seconds since the epoch, by this host's clock."""
    return {"now": time.time()}


def listen(*, port: int) -> dict[str, Any]:
    """Answers every connection with this host's name. port 0: any free one. taken: who knows who has it."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("", port))
        server.listen(128)
    except OSError:
        server.close()
        return {"taken": True}
    _listeners.append(server)
    threading.Thread(target=_greet, args=(server,), daemon=True).start()
    return {"taken": False, "port": server.getsockname()[1]}


def _greet(server: socket.socket) -> None:
    while True:
        try:
            visitor, _ = server.accept()
        except OSError:  # closed
            return
        with contextlib.suppress(OSError), visitor:
            visitor.settimeout(5.0)
            visitor.sendall(socket.gethostname().encode() + b"\n")
            visitor.recv(1)  # it hangs up first: else the port would count as taken for another minute


def hang_up() -> dict[str, Any]:
    """Ends all listeners."""
    while _listeners:
        server = _listeners.pop()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        server.close()
    return {}


def visit(*, address: str, port: int, timeout_s: float) -> dict[str, Any]:
    """Connects to a listener. error: why that failed."""
    try:
        with socket.create_connection((address, port), timeout_s) as line:
            line.settimeout(timeout_s)
            name = line.makefile("rb").readline().decode().strip()
            return {"name": name, "from": line.getsockname()[0], "error": None}
    except OSError as error:
        return {"name": None, "from": None, "error": str(error)}


def route(*, address: str) -> dict[str, Any]:
    """Returns this host's own address on the way to `address`; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return {"from": probe.getsockname()[0]}
    except OSError:
        return {"from": None}


def write(*, path: str, text: str) -> dict[str, Any]:
    """Writes a file. error: why that failed."""
    try:
        Path(path).write_text(text)
    except OSError as error:
        return {"error": str(error)}
    return {"error": None}


def read(*, path: str, text: str, timeout_s: float) -> dict[str, Any]:
    """Waits until the file holds `text`: network file systems show new files late."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(path))  # makes NFS ask the server again
            if Path(path).read_text() == text:
                return {"seen": True}
        if time.monotonic() > deadline:
            return {"seen": False}
        time.sleep(0.2)


def remove(*, path: str) -> dict[str, Any]:
    """Removes a file, if it is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    return {}


def all_reduce(*, root: str, env: dict[str, str], backend: str, timeout_s: float) -> dict[str, Any]:
    """Runs one rank of engine/ranks/hosts/all_reduce.py, in a process of its own, which is over within timeout_s."""
    # -P: beside that file are modules whose names others may have, too
    words = [
        sys.executable,
        "-P",
        "-u",
        str(Path(root, "engine", "ranks", "hosts", "all_reduce.py")),
        backend,
        str(timeout_s),
    ]
    rank = subprocess.Popen(
        words,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, complaint = rank.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    if rank.returncode != 0:
        lines = complaint.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit {rank.returncode}"}
    return {"error": None, **json.loads(output.strip().splitlines()[-1])}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    action.__name__: action for action in (facts, clock, listen, hang_up, visit, route, write, read, remove, all_reduce)
}


def main() -> None:
    """Answers the requests of standard input, one a line."""
    for line in sys.stdin:  # ends when the connection does
        request = json.loads(line)
        answer = ACTIONS[request.pop("do")](**request)
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
