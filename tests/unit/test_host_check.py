"""launch/check_hosts.py, as far as no second host is needed; the rest is in tests/multinode/test_check_hosts.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import free_port

from engine.errors import UserError
from engine.host_agent import COMPARED, _addresses, _interfaces
from engine.host_check import PASSED_ON, HostCheck, table
from engine.hostfile import parse_hostfile, rank_exports
from engine.tool_config import HostCheckConfig

# In place of ssh: runs what it is told on this machine, at most REQUESTS lines of it.
SSH = r"""#!/bin/sh
for command; do :; done
export SSH_CONNECTION='UNKNOWN 65535 UNKNOWN 65535'
while [ "$REQUESTS" -gt 0 ] && IFS= read -r line; do
    printf '%s\n' "$line"
    REQUESTS=$((REQUESTS - 1))
done | sh -c "$command"
"""


@pytest.fixture
def local_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def check(tmp_path: Path, hosts: dict[str, int]) -> HostCheck:
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
    chosen = [name for name, found in _interfaces().items() if set(found) & set(_addresses())]
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "GLOO_SOCKET_IFNAME": ",".join(chosen)}
    return HostCheck(HostCheckConfig(hostfile=str(path), master_port=free_port()), parse_hostfile(path), env)


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
    assert "not tried: one host" in table(report)


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


def test_bad_lines_of_the_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    file = tmp_path / ".deepspeed_env"
    for text in (b"=x\n", b"A B=3\n", b"\n", b"A\n"):
        file.write_bytes(b"A=1\n" + text)
        with pytest.raises(UserError, match=r"\.deepspeed_env, line 2: .* is not NAME=value"):
            rank_exports({}, tmp_path)
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env cannot be read"):
        rank_exports({}, tmp_path)


def test_what_deepspeed_passes_on_by_itself() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert set(PASSED_ON) == {*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)}
