"""tests/support/hosts.py itself: hosts are apart from each other, die and come back, and leave nothing on this
machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import Hosts, which
from launching import ROOT, environment

pytestmark = pytest.mark.multinode


def test_hosts_are_apart_and_leave_nothing(two_hosts: Hosts) -> None:
    """Of the fixture itself: names, networks, disks, ssh; a host that dies and comes back; two sets side by side."""
    ask = ["sh", "-c", f"hostname; hostname -I; echo $$ >>{two_hosts.local}/who; ls /proc | grep -c '^[0-9]'"]
    for number, host in enumerate(two_hosts.names, start=1):
        name, address, processes = two_hosts.run("login", ["ssh", host, *ask[2:]]).stdout.split()
        assert (name, address) == (host, f"10.77.0.{number}")
        assert int(processes) < 10, "it sees no processes but its own"
        assert len((two_hosts.disk(host) / "who").read_text().splitlines()) == 1
    sleeper = two_hosts.start("worker-2", ["sleep", "1000"])
    until = time.monotonic() + 20
    while [p.name() for p in two_hosts.processes("worker-2")] != ["sleep"]:
        assert time.monotonic() < until
    two_hosts.kill("worker-2")
    assert sleeper.wait(10) != 0
    try_ssh = ["ssh", "-o", "ConnectTimeout=1", "worker-2", "hostname"]
    assert two_hosts.run("login", try_ssh).returncode == 255
    two_hosts.boot("worker-2")
    assert two_hosts.run("login", try_ssh).stdout == "worker-2\n"
    assert (two_hosts.disk("worker-2") / "who").is_file(), "a disk outlives a power failure"
    two_hosts.disconnect("worker-2")
    assert two_hosts.run("login", try_ssh).returncode == 255
    two_hosts.connect("worker-2")
    until = time.monotonic() + 20  # the bridge and its neighbours take a second or two to notice
    while two_hosts.run("login", try_ssh).returncode != 0:
        assert time.monotonic() < until
    with Hosts(1) as other:
        assert other.run("login", ["ssh", "worker-1", "hostname"]).stdout == "worker-1\n"
        assert "Could not resolve" in other.run("login", ["ssh", "worker-2", "hostname"]).stdout
        root = other.root
    assert not root.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_its_maker(two_hosts: Hosts, number: signal.Signals) -> None:
    code = """
import signal, time
from hosts import Hosts, which
signal.signal(signal.SIGINT, signal.default_int_handler)
with Hosts(1) as hosts:
    hosts.start("worker-1", ["sleep", "54321"])
    while not hosts.processes("worker-1"):
        time.sleep(0.02)
    inits = [host.init for host in hosts._running.values()]
    print(hosts.root, *(p.pid for p in hosts.processes("worker-1")), *inits, flush=True)
    time.sleep(100)
"""
    env = environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    maker = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    root, *pids = maker.stdout.readline().split()
    processes = [psutil.Process(int(pid)) for pid in pids]
    assert len(processes) == 3
    maker.send_signal(number)
    maker.wait(30)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    with Hosts(1):
        assert not Path(root).exists()
    assert two_hosts.root.exists(), "a living maker's folder is left alone"
    bridges = subprocess.run([str(which("ip")), "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert "hub" not in bridges
    assert "to-worker" not in bridges
