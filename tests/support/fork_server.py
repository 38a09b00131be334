"""Ranks without their imports: each is forked from a process that has torch, transformers, DeepSpeed and the jobs
imported already, and runs the same script there.

What a fork cannot show is left to the real launcher: its command line and signals, variables that are read at import,
and hash seeds that differ from rank to rank.

    python fork_server.py     (started by ForkServer; requests come through its standard input)
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

NUMBER = struct.Struct("=i")
"""What comes back from a start: its pid, and its exit code once it has ended."""
ENDS_WITHIN_S = 30
"""The other ranks, once one has failed: as long as DeepSpeed's launcher waits."""


class ForkedStart:
    """One start, with what the tests use of `subprocess.Popen`."""

    def __init__(self, numbers: int, stdout: IO[str] | None) -> None:
        self._numbers = numbers
        self.stdout = stdout
        self.pid = self._next_number()
        self.returncode: int | None = None
        self._output = b""

    def _next_number(self) -> int:
        return int(NUMBER.unpack(os.read(self._numbers, NUMBER.size))[0])

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._numbers], [], [], 0)[0]:
            self.returncode = self._next_number()
            os.close(self._numbers)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._numbers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"start {self.pid}", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float = 3600) -> tuple[str, None]:
        """What was not read yet, up to the end."""
        until = time.monotonic() + timeout
        assert self.stdout is not None, "its output goes to a file"
        while select.select([self.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            piece = os.read(self.stdout.fileno(), 1 << 16)
            self._output += piece
            if not piece:
                self.wait(max(0.0, until - time.monotonic()))
                self.stdout.close()
                return self._output.decode(), None
        raise subprocess.TimeoutExpired(f"start {self.pid}", timeout, self._output)


def hear_signals() -> None:
    """In a child, before its program: Ctrl-C and a lost terminal mean what they do to a user, though a suite in the
    background of a script, or under nohup, ignores them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class ForkServer:
    """The process that forks, until this one ends; then it ends what it has started too."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-u", __file__]
            self._process = subprocess.Popen(
                argv, stdin=theirs, env=env, cwd=folder, start_new_session=True, preexec_fn=hear_signals
            )

    def start(
        self, script: list[str], *, ranks: int, port: int, env: dict[str, str], output: IO[str] | None
    ) -> ForkedStart:
        """A script with its arguments, as plain `python` starts it, or, with several ranks, as `deepspeed` does. In a
        session of its own. output: as of `launching.spawn`."""
        numbers, theirs = os.pipe()
        reader, writer = os.pipe() if output is None else (None, os.dup(output.fileno()))
        request = json.dumps({"script": script, "ranks": ranks, "port": port, "env": env})
        try:
            socket.send_fds(self._requests, [request.encode()], [writer, theirs])
        finally:
            os.close(writer)
            os.close(theirs)
        return ForkedStart(numbers, None if reader is None else open(reader))


def preload() -> None:
    """Imports, and runs no operator: a process whose threads hold locks cannot be forked."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # whatever the optimizer; it imports torch's compiler
    import pandas  # noqa: F401  when datasets opens its first file
    import torch.utils.cpp_extension  # noqa: F401
    import transformers  # noqa: F401

    import engine.cli
    import engine.jobs.distill.job
    import engine.jobs.finetune.job
    import engine.jobs.proxy.job  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # asks the compiler, for a second
    gc.freeze()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads  # PyArrow's, which jemalloc carries over a fork itself


def serve() -> dict[str, Any]:
    """Forks a process for each request; returns in that one, with the request."""
    requests = socket.socket(fileno=0)
    starts: dict[int, tuple[int, int]] = {}  # pidfd -> pid, where its exit code goes
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in starts:
                poll.unregister(ready)
                pid, numbers = starts.pop(ready)
                tell(numbers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                for descriptor in (ready, numbers):
                    os.close(descriptor)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
            if not message:  # who asked is gone
                for pid, _ in starts.values():
                    os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            output, numbers = descriptors
            pid = os.fork()
            if pid == 0:
                os.setsid()
                tell(numbers, os.getpid())
                os.dup2(os.open(os.devnull, os.O_RDONLY), requests.detach())
                for standard in (1, 2):
                    os.dup2(output, standard)
                for descriptor in (output, numbers, *starts, *(theirs for _, theirs in starts.values())):
                    os.close(descriptor)
                return dict(json.loads(message))
            os.close(output)
            pidfd = os.pidfd_open(pid)
            starts[pidfd] = (pid, numbers)
            poll.register(pidfd, select.POLLIN)


def tell(numbers: int, number: int) -> None:
    try:
        os.write(numbers, NUMBER.pack(number))
    except BrokenPipeError:
        return  # nobody has waited for this start


def lead(count: int, port: int) -> None:
    """Forks the ranks, and returns in them. Itself it ends as DeepSpeed's launcher does: once all have ended, or one
    has failed and the others were ended, with the code of that one."""
    ranks = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            Path("/proc/self/comm").write_text(f"rank {rank}")
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            sys.argv.insert(1, f"--local_rank={rank}")
            return
        ranks.append(psutil.Process(pid))
    signal.signal(signal.SIGTERM, lambda *_: end(ranks, 1))
    while ranks:
        gone, ranks = psutil.wait_procs(ranks, timeout=0.1)
        for process in gone:
            if process.returncode != 0:
                end(ranks, process.returncode)
    os._exit(0)


def end(ranks: list[psutil.Process], code: int) -> None:
    for process in ranks:
        process.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=ENDS_WITHIN_S)
    for process in alive:
        process.kill()
    os._exit(code & 0xFF)


def main() -> None:
    preload()
    request = serve()
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["script"]
    if request["ranks"] > 1:
        lead(request["ranks"], request["port"])
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
