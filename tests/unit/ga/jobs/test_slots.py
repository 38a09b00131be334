from __future__ import annotations

import socket
from pathlib import Path

import pytest

from engine.config.hostfile import parse_hostfile
from engine.errors import UserError
from ga.config import Launcher
from ga.jobs.slots import Placement, Slot, free_port, is_this_machine, plan_slots

FOUR_BY_EIGHT = {"worker-1": 8, "worker-2": 8, "worker-3": 8, "worker-4": 8}


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def placed(
    hosts: dict[str, int] | None, per_job: int, *, local: int | list[int] = 0, launcher: Launcher = "pdsh"
) -> list[str]:
    found = plan_slots(hosts, local_devices=local, slots_per_job=per_job, launcher=launcher)
    return [str(placement) for placement in found]


def test_hostfile(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# the cluster\n\n  worker-2 slots=4\nworker-1\tslots=8 # the big one\n")
    assert list(parse_hostfile(path).items()) == [("worker-2", 4), ("worker-1", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-1 slots=4\nworker-2\n", r"hostfile, line 2: 'worker-2' is not a host; write HOST slots=N"),
        ("worker-1 slots=4x\n", r"line 1: .* is not a host"),
        ("worker-1 slots=4\n\nworker-1 slots=4\n", r"line 3: host 'worker-1' occurs twice"),
        ("worker-1 slots=0\n", r"line 1: 'worker-1 slots=0': a host has 1 to 1024 slots"),
        ("me@worker-1 slots=2\n", r"line 1: host 'me@worker-1' is not a plain name"),
        ("-worker slots=1\n", r"line 1: host '-worker' is not a plain name"),
        ("worker-[1-4] slots=1\n", r"line 1: host 'worker-\[1-4\]' is not a plain name"),
        ("worker-1 slots=1 worker-2 slots=1\n", r"line 1: .* is not a host"),
        ("# nobody\n", r"names no host"),
        ("worker-1 slots=99999999999999999999\n", r"line 1: .*: a host has 1 to 1024 slots"),
        ("\ufeffworker-1 slots=1\n", r"line 1: a byte order mark"),
        (
            "a slots=1\nb\na slots=2\n",
            r"^2 problems: \(1\) .*, line 2: 'b' is not .* \(2\) .*, line 3: host 'a' occurs",
        ),
    ],
)
def test_bad_hostfile(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_hostfile(hostfile(tmp_path, text))


def test_hostfile_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: cannot be read: No such file"):
        parse_hostfile(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes: is UTF-16 text; save it as UTF-8"):
        parse_hostfile(tmp_path / "bytes")


def test_local_jobs_side_by_side() -> None:
    assert placed(None, 1, local=3) == ["localhost:0", "localhost:1", "localhost:2"]
    assert placed(None, 2, local=5) == ["localhost:0,1", "localhost:2,3"]
    assert placed(None, 2, local=[2, 3, 6, 7]) == ["localhost:2,3", "localhost:6,7"]
    first = plan_slots(None, local_devices=4, slots_per_job=2, launcher="pdsh", on_cpu=True)[0]
    assert first == Placement((Slot("localhost", (0, 1)),), on_cpu=True, jobs_on_host=2)
    assert first.is_local
    assert first.world_size == 2


def test_too_few_local_devices() -> None:
    with pytest.raises(UserError, match=r"slots_per_job=3: this machine offers 2 slots"):
        placed(None, 3, local=2)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", socket.gethostname()])
def test_a_hostfile_of_this_machine_alone_is_local(name: str) -> None:
    assert placed({name: 4}, 2) == ["localhost:0,1", "localhost:2,3"]


def test_this_machine_by_its_long_or_short_name() -> None:
    own = socket.gethostname().partition(".")[0]
    assert is_this_machine(own)
    assert not is_this_machine(f"{own}x")
    assert is_this_machine(f"{own}.cluster") == ("." not in socket.gethostname())


def test_a_remote_job_owns_its_hosts() -> None:
    assert placed(FOUR_BY_EIGHT, 8) == ["worker-1", "worker-2", "worker-3", "worker-4"]
    assert placed(FOUR_BY_EIGHT, 16) == ["worker-1@worker-2", "worker-3@worker-4"]
    assert placed(FOUR_BY_EIGHT, 24) == ["worker-1@worker-2@worker-3"]
    assert placed({"a": 4, "b": 8, "c": 4}, 8) == ["b", "a@c"]
    pair = plan_slots({"a": 4, "c": 4}, local_devices=0, slots_per_job=8, launcher="openmpi")[0]
    assert not pair.is_local
    assert pair.world_size == 8
    assert pair.hostfile == "a slots=4\nc slots=4\n"


@pytest.mark.parametrize("per_job", [1, 4, 12, 33, 40])
def test_part_of_a_host_is_refused_with_what_would_work(per_job: int) -> None:
    with pytest.raises(UserError, match=rf"slots_per_job={per_job}: .*worker-1 8, .*; write 8 or 16 or 24 or 32$"):
        placed(FOUR_BY_EIGHT, per_job)


def test_this_machine_among_others_never_goes_through_pdsh() -> None:
    own = socket.gethostname()
    assert placed({own: 2, "worker-1": 2}, 2) == ["localhost:0,1", "worker-1"]
    assert placed({own: 2, "worker-1": 2}, 4) == [f"{own}@worker-1"]  # the only job: no other that it could end
    hosts = {own: 2, "worker-1": 2, "worker-2": 2, "worker-3": 2}
    with pytest.raises(UserError, match="is this machine and would share a job"):
        placed(hosts, 4)
    assert len(placed(hosts, 4, launcher="openmpi")) == 2
    with pytest.raises(UserError, match=r"localhost and 127\.0\.0\.1 are one machine"):
        placed({"localhost": 2, "127.0.0.1": 2}, 2)


def test_slurm_wants_equal_hosts() -> None:
    with pytest.raises(UserError, match="srun wants equal slots"):
        placed({"a": 4, "b": 2}, 6, launcher="slurm")
    assert placed({"a": 4, "b": 2}, 6) == ["a@b"]


def test_placements_have_names_of_their_own() -> None:
    every = [
        *plan_slots(None, local_devices=12, slots_per_job=1, launcher="pdsh"),
        *plan_slots(FOUR_BY_EIGHT, local_devices=0, slots_per_job=16, launcher="pdsh"),
    ]
    names = {placement.name for placement in every}
    assert len(names) == len(every)
    assert all("/" not in name and " " not in name for name in names)


def test_ports_are_free_and_never_the_same() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == 500
    with socket.socket() as listener:
        listener.bind(("", ports[-1]))
