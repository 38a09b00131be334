"""Where the jobs of a search can run: devices of this machine, or whole hosts of a hostfile."""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import UserError
from ga.config import Launcher

LOCAL = "localhost"
_LOOPBACK = (LOCAL, "127.0.0.1", "::1")

_recent_ports: deque[int] = deque(maxlen=4096)
_port_lock = threading.Lock()


@dataclass(frozen=True)
class Slot:
    """The devices of one host that a job takes."""

    host: str
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """What one job occupies while it runs."""

    slots: tuple[Slot, ...]
    on_cpu: bool = False
    """Whether ranks compute on CPU cores: `devices` only tell jobs of one host apart."""
    jobs_on_host: int = 1
    """Number of jobs that run side by side on the host; more than 1 on this machine only."""

    @property
    def is_local(self) -> bool:
        return self.hosts == (LOCAL,)

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(slot.host for slot in self.slots)

    @property
    def world_size(self) -> int:
        return sum(len(slot.devices) for slot in self.slots)

    @property
    def hostfile(self) -> str:
        """The text of a hostfile with these hosts only."""
        return "".join(f"{slot.host} slots={len(slot.devices)}\n" for slot in self.slots)

    @property
    def name(self) -> str:
        """Unique among the placements of a driver, and fit for a folder's name."""
        devices = "-".join(map(str, self.slots[0].devices))
        return re.sub(r"[^\w.+-]", "_", f"{LOCAL}-{devices}" if self.is_local else "+".join(self.hosts))

    def __str__(self) -> str:
        return f"{LOCAL}:{','.join(map(str, self.slots[0].devices))}" if self.is_local else "@".join(self.hosts)


def is_this_machine(host: str) -> bool:
    """Tells whether a host is this machine. Names are compared, not looked up: `node1` and `node1.cluster` are the
    same."""
    own = socket.gethostname()
    if host in (*_LOOPBACK, own):
        return True
    short = "." not in host or "." not in own
    return short and host.partition(".")[0] == own.partition(".")[0]


def plan_slots(
    hosts: Mapping[str, int] | None,
    *,
    local_devices: int | Sequence[int],
    slots_per_job: int,
    launcher: Launcher,
    on_cpu: bool = False,
) -> list[Placement]:
    """Returns placements each of which can hold a job at the same time as the others. Devices or hosts that are too few
    for one more job stay idle.

    hosts: slots by host, from a hostfile; None, or this machine alone, gives local jobs, which need no ssh.
    local_devices: how many devices this machine has, or their ids (as in CUDA_VISIBLE_DEVICES); unused with hosts.
    Raises UserError, which says what would work.
    """
    assert slots_per_job >= 1
    if hosts is None:
        devices = range(local_devices) if isinstance(local_devices, int) else local_devices
        return _local(devices, slots_per_job, on_cpu)
    if len(hosts) == 1 and is_this_machine(next(iter(hosts))):
        return _local(range(next(iter(hosts.values()))), slots_per_job, on_cpu)
    here = [host for host in hosts if is_this_machine(host)]
    if len(here) > 1:
        raise UserError(f"hostfile: {' and '.join(here)} are one machine, this one; keep one of these lines")
    groups = _whole_hosts(hosts, slots_per_job)
    if groups is None:
        listed = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        fitting = [n for n in range(1, sum(hosts.values()) + 1) if _whole_hosts(hosts, n) is not None]
        raise UserError(
            f"search.slots_per_job={slots_per_job}: a job on other hosts takes them whole (ending it ends every "
            f"DeepSpeed job there), and these have {listed} slots; write {' or '.join(map(str, fitting))}"
        )
    for group in groups:
        _check_group(group, hosts, launcher, alone=len(groups) == 1)
    return [_owned(group, hosts, on_cpu) for group in groups]


def _local(devices: Sequence[int], slots_per_job: int, on_cpu: bool) -> list[Placement]:
    jobs = len(devices) // slots_per_job
    if jobs == 0:
        raise UserError(
            f"search.slots_per_job={slots_per_job}: this machine offers {len(devices)} slots; write at most that many"
        )
    chunks = [tuple(devices[i * slots_per_job : (i + 1) * slots_per_job]) for i in range(jobs)]
    return [Placement((Slot(LOCAL, chunk),), on_cpu, jobs_on_host=jobs) for chunk in chunks]


def _whole_hosts(hosts: Mapping[str, int], slots_per_job: int) -> list[tuple[str, ...]] | None:
    """Returns groups of hosts with exactly that many slots, the largest hosts first; None when a job would need part
    of one."""
    groups: list[tuple[str, ...]] = []
    group: tuple[str, ...] = ()
    for host in sorted(hosts, key=lambda name: -hosts[name]):
        group = (*group, host)
        taken = sum(hosts[name] for name in group)
        if taken > slots_per_job:
            return None
        if taken == slots_per_job:
            groups.append(group)
            group = ()
    return groups or None


def _check_group(group: tuple[str, ...], hosts: Mapping[str, int], launcher: Launcher, *, alone: bool) -> None:
    """Raises UserError for hosts that cannot share a job."""
    if launcher == "slurm" and len({hosts[host] for host in group}) > 1:
        counts = ", ".join(f"{host} {hosts[host]}" for host in group)
        raise UserError(f"search.launcher='slurm': srun wants equal slots on all hosts of a job, got {counts}")
    here = [host for host in group if is_this_machine(host)]
    if launcher == "pdsh" and here and len(group) > 1 and not alone:
        # On SIGTERM the job runs `pkill -f` on its hosts. On this one it would find the pdsh of every other job.
        raise UserError(
            f"hostfile: {here[0]!r} is this machine and would share a job with other hosts; ending that job would end "
            "all others. Remove it from the hostfile, start the search elsewhere, or give one job all hosts"
        )


def _owned(group: tuple[str, ...], hosts: Mapping[str, int], on_cpu: bool) -> Placement:
    if len(group) == 1 and is_this_machine(group[0]):
        return Placement((Slot(LOCAL, tuple(range(hosts[group[0]]))),), on_cpu)
    return Placement(tuple(Slot(host, tuple(range(hosts[host]))) for host in group), on_cpu)


def free_port() -> int:
    """Returns a TCP port that is free on this machine now, and not among the last 4,096 that this process was given."""
    with _port_lock:
        while True:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = int(probe.getsockname()[1])
            if port not in _recent_ports:
                _recent_ports.append(port)
                return port
