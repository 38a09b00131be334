"""launch/check_hosts.py, as far as no second host is needed; the rest is in tests/multinode/test_check_hosts.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, free_port

from engine.config.hostfile import parse_hostfile, rank_exports
from engine.config.tools import HostCheckConfig
from engine.errors import UserError
from engine.ranks.hosts.agent import COMPARED, _addresses, _interfaces
from engine.ranks.hosts.check import ANSWER_S, PASSED_ON, HostCheck, table
from engine.ranks.hosts.link import CLOSE_S, HostLink, close_all

# In place of ssh: runs what it is told on this machine, at most REQUESTS lines of it.
SSH = r"""#!/bin/sh
for command; do :; done
export SSH_CONNECTION='UNKNOWN 65535 UNKNOWN 65535'
while [ "$REQUESTS" -gt 0 ] && IFS= read -r line; do
    printf '%s\n' "$line"
    REQUESTS=$((REQUESTS - 1))
done | sh -c "$command"
"""


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ssh: str) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(ssh)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def local_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, SSH)


def check(tmp_path: Path, hosts: dict[str, int], *, seconds: float = HostCheckConfig.seconds) -> HostCheck:
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
    chosen = [name for name, found in _interfaces().items() if set(found) & set(_addresses())]
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "GLOO_SOCKET_IFNAME": ",".join(chosen)}
    config = HostCheckConfig(hostfile=str(path), master_port=free_port(), seconds=seconds)
    return HostCheck(config, parse_hostfile(path), env)


def facts(gpus: int) -> dict[str, object]:
    packages = dict.fromkeys(COMPARED, "1.0")
    return {"has_cwd": True, "code": "abc", "python": "3.11.7", "packages": packages, "gpus": gpus}


def wrongs(tmp_path: Path, *gpus: int) -> list[str]:
    asked = check(tmp_path, {f"host-{i}": 8 for i in range(len(gpus))})
    for verdict, count in zip(asked._report.hosts, gpus, strict=True):
        verdict.facts = facts(count)
    asked._compare()
    return [text for verdict in asked._report.hosts for text in verdict.wrong]


def test_a_host_without_gpus_beside_one_with_them_is_wrong(tmp_path: Path) -> None:
    (text,) = wrongs(tmp_path, 8, 0)
    assert "slots=8, but it has 0 GPUs" in text
    assert len(wrongs(tmp_path, 4, 8)) == 1
    assert wrongs(tmp_path, 8, 8) == []
    assert wrongs(tmp_path, 0, 0) == [], "ranks on processors"


def test_a_connection_without_addresses(tmp_path: Path, local_ssh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """sshd says UNKNOWN of one through a proxy command."""
    monkeypatch.setenv("REQUESTS", "100")
    report = check(tmp_path, {"here": 1}).run()
    assert report.hosts[0].facts["reached_at"] == "UNKNOWN"
    assert report.all_reduce == {}
    assert "not tested: one host" in table(report)


@pytest.mark.skipif(
    not _addresses(),
    reason="this machine has no address but loopback, so no all-reduce would be tried",
)
def test_a_first_host_that_goes_before_the_all_reduce(
    tmp_path: Path, local_ssh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is still there, with what was wrong."""
    monkeypatch.setenv("REQUESTS", "100")
    whole = check(tmp_path, {"one": 1, "two": 1})
    asked: list[str] = []
    ask = whole._ask

    def counted(verdict, do, **arguments):
        asked.extend([do] if verdict.host == "one" else [])
        return ask(verdict, do, **arguments)

    whole._ask = counted
    whole._all_reduce = lambda: None
    whole.run()
    monkeypatch.setenv("REQUESTS", str(len(asked) + 3))  # and three readings of the clock
    report = check(tmp_path, {"one": 1, "two": 1}).run()
    assert not report.ok
    assert report.hosts[0].interface is not None, "it was there until then"
    assert "the connection was closed" in table(report)


def test_more_seconds_lengthen_every_stage(tmp_path: Path) -> None:
    """And the all-reduce has all that is left of them, at the address where the others came."""
    whole = check(tmp_path, {"one": 8, "two": 8}, seconds=200)
    assert whole._left(ANSWER_S) == 4 * ANSWER_S
    asked = []

    def ask(verdict, do, **arguments):
        asked.append((do, arguments))
        return {"error": None, "taken": False, "port": 1}

    whole._ask = ask
    whole._each = lambda ask, verdicts: [ask(verdict) for verdict in verdicts]
    for verdict in whole._report.hosts:
        verdict.facts, verdict.address = facts(0), f"at-{verdict.host}"
    whole._all_reduce()
    ranks = [arguments for do, arguments in asked if do == "all_reduce"]
    assert [rank["timeout_s"] for rank in ranks] == pytest.approx([198, 198], abs=2)
    assert [rank["env"]["MASTER_ADDR"] for rank in ranks] == ["at-one", "at-one"]


def test_hosts_that_hang_are_left_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "#!/bin/sh\nexec sleep 60\n")
    links = [HostLink(f"host-{i}", env={}, ssh_port=None) for i in range(6)]
    began = time.monotonic()
    close_all(links)
    assert CLOSE_S <= time.monotonic() - began < 4 * CLOSE_S


@pytest.mark.parametrize(("limit", "enough"), [("-Sn", True), ("-n", False)])
def test_more_hosts_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, enough: bool) -> None:
    """The soft limit is raised; under a hard one the hosts for which it is too low say so."""
    stand_in(tmp_path, monkeypatch, "#!/bin/sh\nexit 255\n")
    (tmp_path / "hostfile").write_text("".join(f"host-{i} slots=1\n" for i in range(12)))
    command = shlex.join([sys.executable, "launch/check_hosts.py", "--hostfile", str(tmp_path / "hostfile")])
    words = ["bash", "-c", f"ulimit {limit} 24; exec {command}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("host-")]
    assert len(lines) == 12
    full = [line for line in lines if "ssh cannot be started here ([Errno 24] Too many open files" in line]
    assert len(full) == 0 if enough else 1 < len(full) < 12
    assert sum("the connection was closed" in line for line in lines) == 12 - len(full)


def test_bad_lines_of_the_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    file = tmp_path / ".deepspeed_env"
    for text in (b"=x\n", b"A B=3\n", b"\n", b"A\n"):
        file.write_bytes(b"A=1\n" + text)
        with pytest.raises(UserError, match=r"\.deepspeed_env, line 2: .* is not NAME=value"):
            rank_exports({}, tmp_path)
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 1: byte 0xff is not UTF-8"):
        rank_exports({}, tmp_path)


def test_what_deepspeed_passes_on_by_itself() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert set(PASSED_ON) == {*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)}
