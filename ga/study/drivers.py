"""The drivers that share a study: who is at work, and whose trials are lost."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from optuna import Study

from engine.records.processes import boot_id, pid_namespace, start_ticks
from ga.optuna_private import set_study_attr, study_attrs
from ga.study.storage import transient

PREFIX = "mapdistill:driver:"
"""Prefix of the study's system attributes that hold a driver's lease."""
BEAT_EVERY_S = 10.0
LEASE_S = 90.0
"""Seconds after which a driver on another machine is dead when its beat stands still, by the observer's clock."""
BLIND_S = 30.0
"""Seconds after which an observer that has not looked starts anew: the storage may have been away for both."""


@dataclass(frozen=True)
class Driver:
    """One process that drives a search."""

    host: str
    pid: int
    started: int
    """Start of the process, in clock ticks after boot."""
    boot: str
    namespace: str
    """Namespace of process ids: containers of one machine cannot look up each other's."""

    @classmethod
    def this_process(cls) -> Driver:
        started = start_ticks(os.getpid())
        assert started is not None
        return cls(socket.gethostname(), os.getpid(), started, boot_id(), pid_namespace())

    @property
    def id(self) -> str:
        return f"{self.host}-{self.pid}-{self.started}-{self.boot[:8]}"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Drivers:
    """The drivers of one study, as one of them sees them."""

    def __init__(self, study: Study, me: Driver, *, placements: int) -> None:
        """Registers this driver. placements: how many jobs it can run side by side."""
        self.me = me
        self._study = study
        self._placements = placements
        self._beats = 0
        self._beaten: float | None = None
        self._seen: dict[str, tuple[int, float, float]] = {}
        """Beat of a driver on another machine, since when it stands still, and when it was last looked at."""
        self.beat()

    def beat(self) -> None:
        """Says that this driver is alive; call it often."""
        if self._beaten is None or time.monotonic() - self._beaten >= BEAT_EVERY_S:
            self._write(left=False)
            self._beaten = time.monotonic()
            self._beats += 1

    def leave(self) -> None:
        """Frees what this driver still owns for others at once. A storage that does not answer is let be: others
        find out."""
        try:
            self._write(left=True)
        except Exception as error:
            if not transient(error):
                raise

    def _write(self, *, left: bool) -> None:
        lease = {
            **asdict(self.me),
            "beat": self._beats,
            "at": time.time(),
            "placements": self._placements,
            "left": left,
        }
        set_study_attr(self._study, PREFIX + self.me.id, lease)

    def _leases(self) -> dict[str, dict[str, Any]]:
        return _leases(self._study)

    def dead(self) -> set[str]:
        """Returns the ids of drivers that are gone. One on another machine is known to be only after LEASE_S."""
        return {id for id, lease in self._leases().items() if self._is_dead(id, lease)}

    def _is_dead(self, id: str, lease: dict[str, Any]) -> bool:
        if id == self.me.id:
            return False
        if lease["left"]:
            return True
        if lease["boot"] == self.me.boot and lease["namespace"] == self.me.namespace:
            return bool(start_ticks(lease["pid"]) != lease["started"])
        now = time.monotonic()
        beat, since, looked = self._seen.get(id, (-1, now, now))
        if beat != lease["beat"] or now - looked > BLIND_S:
            since = now
        self._seen[id] = (lease["beat"], since, now)
        return now - since > LEASE_S

    def ran_here(self, id: str) -> bool:
        """Tells whether that driver started its jobs among the processes that this one can see and end."""
        lease = self._leases().get(id)
        return lease is not None and (lease["boot"], lease["namespace"]) == (self.me.boot, self.me.namespace)

    def all_placements(self) -> int:
        """Returns how many jobs all drivers that are alive can run side by side."""
        dead = self.dead()
        return sum(lease["placements"] for id, lease in self._leases().items() if id not in dead)


def _leases(study: Study) -> dict[str, dict[str, Any]]:
    attrs = study_attrs(study).items()
    return {key.removeprefix(PREFIX): value for key, value in attrs if key.startswith(PREFIX)}


@dataclass(frozen=True)
class PresentDriver:
    """A driver that has not left, as a reader sees it who looks once."""

    name: str
    is_silent: bool
    """Whether it is on another machine and has given no sign of life for LEASE_S, by the clocks of both: it was
    killed, or its machine has gone."""


def present_drivers(study: Study) -> dict[str, PresentDriver]:
    """Returns the drivers that have not left by id; without those of this machine whose process has gone."""
    here = (boot_id(), pid_namespace())
    shown = {}
    for id, lease in _leases(study).items():
        is_local = (lease["boot"], lease["namespace"]) == here
        if lease["left"] or (is_local and start_ticks(lease["pid"]) != lease["started"]):
            continue
        is_silent = not is_local and time.time() - lease.get("at", 0.0) > LEASE_S
        shown[id] = PresentDriver(f"process {lease['pid']} on {lease['host']}", is_silent)
    return shown
