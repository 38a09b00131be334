"""The findings of a check of hosts, and how they are shown. No torch here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from engine.ranks.hosts.link import HostError
from engine.records.columns import labelled_lines

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class Verdict:
    """Findings about one host."""

    host: str
    slots: int
    wrong: list[str] = field(default_factory=list)
    """Reasons why a job cannot run, each with its remedy."""
    doubtful: list[str] = field(default_factory=list)
    """Doubts that a job can run with, each with its remedy."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Answer of agent.facts; empty where it was not reached."""
    address: str | None = None
    """Address at which the others reach it."""
    interface: str | None = None
    """Interface that leads to the others."""
    clock_ahead_s: float = 0.0
    """Seconds by which its clock is ahead of the first host's."""

    @property
    def word(self) -> str:
        return "WRONG" if self.wrong else "doubtful" if self.doubtful else "ok"

    def interface_at(self, address: str | None) -> str | None:
        """Returns which of its interfaces has the address."""
        interfaces: dict[str, list[str]] = self.facts["interfaces"]
        return next((name for name, addresses in interfaces.items() if address in addresses), None)

    def fail(self, error: HostError) -> None:
        """Takes it out of the later stages."""
        self.facts = {}
        self.wrong.append(f"{error.what}; {error.remedy}")


@dataclass
class Report:
    """Findings about all hosts."""

    hosts: list[Verdict]
    all_reduce: dict[str, Any] = field(default_factory=dict)
    """Answer of agent.all_reduce and its backend; empty: not tried."""
    settings: dict[str, str] = field(default_factory=dict)
    """Lines for .deepspeed_env that are missing there."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not any(verdict.wrong for verdict in self.hosts) and self.all_reduce.get("error") is None


def table(report: Report) -> str:
    """Returns one line for each host, one for each further thing that is wrong with it, and those of the whole."""
    width = max(len(verdict.host) for verdict in report.hosts)
    lines = []
    for verdict in report.hosts:
        texts = [*verdict.wrong, *verdict.doubtful] or [_facts_line(verdict)]
        heads = [f"{verdict.host:<{width}}  {verdict.word:<8}", *[" " * (width + 10)] * (len(texts) - 1)]
        lines += [f"{head}  {text}" for head, text in zip(heads, texts, strict=True)]
    facts = report.all_reduce
    if not facts:
        outcome = "not tested: one host" if len(report.hosts) == 1 else "not tested: first repair what is WRONG above"
    elif facts["error"] is not None:
        outcome = (
            f"{facts['backend']} FAILED ({facts['error']}); look at firewalls, set {INTERFACE} in .deepspeed_env, and "
            "give more --seconds where Python and torch start slowly"
        )
    else:
        outcome = (
            f"{facts['backend']}, one rank a host: {facts['latency_ms']:.2f} ms for 4 bytes, {facts['gbit_per_s']:.2f} "
            f"Gbit/s in and out of each host for {facts['mib']:.0f} MiB"
        )
    rows = [("all-reduce", outcome)]
    if report.settings:
        missing = shlex.join(f"{name}={value}" for name, value in report.settings.items())
        rows.append(("settings", f"missing in .deepspeed_env, but set for this all-reduce: {missing}"))
    rows.append(("verdict", f"{'ready' if report.ok else 'NOT ready'} ({report.seconds:.1f} s)"))
    return "\n".join([*lines, labelled_lines(rows)])


def _facts_line(verdict: Verdict) -> str:
    facts = verdict.facts
    versions = ", ".join(f"{package} {version}" for package, version in facts["packages"].items())
    gpus = f", {facts['gpus']} GPUs" if facts["gpus"] else ""
    return (
        f"{verdict.address} on {verdict.interface}, clock {verdict.clock_ahead_s:+.2f} s, Python {facts['python']}, "
        f"{versions}, code {facts['code']}{gpus}"
    )
