"""launch/check_hosts.py on two hosts: what it says when all is right, and for each thing that is not."""

from __future__ import annotations

import json
import shlex
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from hosts import INTERFACE, Hosts
from launching import ROOT

pytestmark = pytest.mark.multinode

GLOO = f"GLOO_SOCKET_IFNAME={INTERFACE}\n"


def check(hosts: Hosts, *more: str, expect: int) -> str:
    began = time.monotonic()
    words = [sys.executable, "launch/check_hosts.py", "--hostfile", str(hosts.hostfile), *more]
    done = hosts.run("login", words, timeout=100)
    assert done.returncode == expect, done.stdout
    assert time.monotonic() - began < 60
    return str(done.stdout)


def line_of(output: str, host: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{host} ")]
    return line


def without_interface(hosts: Hosts) -> None:
    hosts.exports.write_text(hosts.exports.read_text().replace(GLOO, ""))


def test_everything_right(two_hosts: Hosts) -> None:
    answer = json.loads(check(two_hosts, "--shared", str(two_hosts.root), "--json", expect=0))
    assert answer["ok"]
    assert [(h["host"], h["interface"], h["wrong"], h["doubtful"]) for h in answer["hosts"]] == [
        ("worker-1", INTERFACE, [], []),
        ("worker-2", INTERFACE, [], []),
    ]
    assert [h["address"] for h in answer["hosts"]] == ["10.77.0.1", "10.77.0.2"]
    assert answer["hosts"][1]["facts"]["packages"]["deepspeed"]
    assert answer["all_reduce"]["error"] is None
    assert 0.01 < answer["all_reduce"]["gbit_per_s"] < 1000
    assert not list(two_hosts.root.glob(".check_hosts*"))
    two_hosts.assert_idle()


@pytest.mark.thorough
def test_ssh_over_a_network_of_its_own(two_hosts: Hosts) -> None:
    """`login` knows worker-1, then worker-2, by an address that leads nowhere from the other worker."""

    def ip(host: str, *words: str) -> None:
        done = two_hosts.run(host, ["ip", *words])
        assert done.returncode == 0, done.stdout

    for number, name in enumerate(two_hosts.names, start=1):
        ip(name, "address", "add", f"10.88.0.{number}/32", "dev", "lo")
        ip("login", "route", "add", f"10.88.0.{number}", "via", two_hosts.address(name))
        two_hosts.resolve("login", name, f"10.88.0.{number}")
        answer = json.loads(check(two_hosts, "--json", expect=0))
        assert answer["hosts"][number - 1]["facts"]["reached_at"] == f"10.88.0.{number}"
        assert [(h["address"], h["interface"], h["doubtful"]) for h in answer["hosts"]] == [
            ("10.77.0.1", INTERFACE, []),
            ("10.77.0.2", INTERFACE, []),
        ]


@pytest.mark.thorough
def test_sshd_down_host_down_port_taken_and_folder_not_shared(two_hosts: Hosts) -> None:
    """Four mistakes that are found before any rank is started."""
    output = check(two_hosts, "--shared", str(two_hosts.local), expect=2)
    assert "ok" in line_of(output, "worker-1")
    assert f"a file that worker-1 wrote in {two_hosts.local} is not there" in line_of(output, "worker-2")
    assert "NOT ready" in output

    taken = (
        "import socket; s = socket.socket(); s.bind(('', 29500)); s.listen(); print('ready', flush=True); s.accept()"
    )
    other = two_hosts.start("worker-1", [sys.executable, "-c", taken])
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    output = check(two_hosts, expect=2)
    assert "port 29500 is taken; give --master_port" in line_of(output, "worker-1")
    assert "ok" in line_of(output, "worker-2")

    two_hosts.stop_ssh("worker-2")
    output = check(two_hosts, "--master_port", "29501", expect=2)
    assert "ok" in line_of(output, "worker-1")
    assert "Connection refused; no ssh server listens there" in line_of(output, "worker-2")
    two_hosts.boot("worker-2")

    two_hosts.disconnect("worker-2")
    output = check(two_hosts, "--master_port", "29501", expect=2)
    assert "ok" in line_of(output, "worker-1")
    assert "timed out; it is down, or the network to it is" in line_of(output, "worker-2")


@pytest.mark.thorough
def test_other_versions_other_code_no_python_no_key(two_hosts: Hosts, tmp_path: Path) -> None:
    """Mounted over what worker-1 has, on worker-2 only."""

    def mount(source: Path, target: Path) -> None:
        done = two_hosts.run("worker-2", ["mount", "--bind", str(source), str(target)])
        assert done.returncode == 0, done.stdout

    found = distribution("transformers").locate_file(f"transformers-{version('transformers')}.dist-info/METADATA")
    old = tmp_path / "METADATA"
    old.write_text(Path(str(found)).read_text().replace(f"Version: {version('transformers')}", "Version: 4.0.1"))
    mount(old, Path(str(found)))
    changed = tmp_path / "mapping.py"
    changed.write_text((ROOT / "engine" / "mapping.py").read_text() + "\n")
    mount(changed, ROOT / "engine" / "mapping.py")
    output = check(two_hosts, expect=2)
    assert "ok" in line_of(output, "worker-1")
    assert f"mapdistill's code differs from worker-1's; bring {ROOT} to the same commit" in line_of(output, "worker-2")
    assert f"transformers 4.0.1, but {version('transformers')} on worker-1; " in output
    assert f"-m pip install transformers=={version('transformers')}" in output
    assert "not tested: first repair" in output

    empty = tmp_path / "empty"
    empty.mkdir()
    mount(empty, Path(sys.executable).parent)
    assert f"this Python ({sys.executable}) is not there" in line_of(check(two_hosts, expect=2), "worker-2")

    mount(Path("/dev/null"), two_hosts.root / "user_key.pub")
    output = line_of(check(two_hosts, expect=2), "worker-2")
    assert "put your public key there (`ssh-copy-id worker-2`)" in output


@pytest.mark.thorough
def test_a_name_that_is_the_loopback(two_hosts: Hosts) -> None:
    """Debian's installer writes `127.0.1.1 name`. gloo would listen there, and nobody would come."""
    without_interface(two_hosts)
    two_hosts.resolve("worker-2", "worker-2", "127.0.1.1")
    output = check(two_hosts, expect=2)
    assert "ok" in line_of(output, "worker-1")
    assert "its name worker-2 is 127.0.1.1 to itself" in line_of(output, "worker-2")
    assert f"put GLOO_SOCKET_IFNAME={INTERFACE} into .deepspeed_env" in line_of(output, "worker-2")
    assert "Gbit/s" in output, "the all-reduce was tried with the remedy"

    two_hosts.exports.write_text(two_hosts.exports.read_text() + GLOO.replace(INTERFACE, "ib0"))
    output = check(two_hosts, expect=2)
    assert f"GLOO_SOCKET_IFNAME=ib0, but only these are up: {INTERFACE}" in line_of(output, "worker-1")


@pytest.mark.thorough
@pytest.mark.launcher
@pytest.mark.skipif(
    not (ROOT / "data/news/manifest.json").is_file() or not (ROOT / "models/all-MiniLM-L6-v2").is_dir(),
    reason="the quick start's teacher and text are not here: run `make data`",
)
def test_the_commands_of_the_documentation(two_hosts: Hosts, tmp_path: Path) -> None:
    """Those with a hostfile: the check as it stands there, the training up to its banner."""
    block = (ROOT / "docs" / "multi_node.md").read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0]
    checking, training = (
        shlex.split(line.replace("hostfile hostfile", f"hostfile {two_hosts.hostfile}")) for line in block.splitlines()
    )
    done = two_hosts.run("login", checking)
    assert done.returncode == 0, done.stdout
    training[training.index("--output_dir") + 1] = str(tmp_path / "run")
    done = two_hosts.run("login", [*training, "--dry_run"], timeout=300)
    assert done.returncode == 0, done.stdout
    assert "x 2 ranks" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_mistakes_in_its_own_files(two_hosts: Hosts) -> None:
    two_hosts.exports.write_text(f"{GLOO}\nPATH=/bin\n")
    assert "line 2: '' is not NAME=value" in check(two_hosts, expect=2)
    two_hosts.hostfile.write_text("worker-1 slots=one\n")
    assert "line 1: 'worker-1 slots=one' is not a host" in check(two_hosts, expect=2)
