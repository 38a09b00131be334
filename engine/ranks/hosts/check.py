"""Checks whether the hosts of a hostfile can train together, and says what to do where they cannot. No torch here."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config.hostfile import parse_hostfile, rank_exports
from engine.config.places import ROOT
from engine.config.tools import HostCheckConfig
from engine.ranks.hosts.agent import COMPARED
from engine.ranks.hosts.link import HostError, HostLink, close_all
from engine.ranks.hosts.report import INTERFACE, Report, Verdict, table

PASSED_ON = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")
"""Beginnings of the variables that DeepSpeed passes on to other hosts by itself."""
FACTS_S = 20.0
"""ssh's own limit on connecting, and the start of Python from a slow disk."""
ANSWER_S = 10.0
CLOCK_S = 2.0


def check_hosts(config: HostCheckConfig) -> bool:
    """Prints the report. Returns whether a job would run. Raises UserError for a hostfile or .deepspeed_env with a
    mistake."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # a kernel may refuse its own hard limit; hosts for which it is too low say so
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a host takes three, and 1024 is usual
    report = HostCheck(config, parse_hostfile(Path(config.hostfile)), ranks_environment(os.environ)).run()
    print(json.dumps({"ok": report.ok, **asdict(report)}, indent=1) if config.json else table(report))
    return report.ok


def ranks_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what a rank on another host gets from `deepspeed` started here and now."""
    cwd = str(Path.cwd())
    passed = {name: value for name, value in environ.items() if name.startswith(PASSED_ON)}
    python_path = f"{cwd}:{environ['PYTHONPATH']}" if environ.get("PYTHONPATH") else cwd
    return {**passed, "PYTHONPATH": python_path, **rank_exports(environ, Path.cwd())}


class HostCheck:
    """One check. Hosts are asked side by side, each through one ssh connection; stages follow one another."""

    def __init__(self, config: HostCheckConfig, hosts: Mapping[str, int], env: Mapping[str, str]) -> None:
        self._config, self._env = config, env
        self._verdicts = [Verdict(host, slots) for host, slots in hosts.items()]
        self._first = self._verdicts[0]
        self._links: dict[str, HostLink] = {}
        self._deadline = time.monotonic() + config.seconds
        self._report = Report(self._verdicts)

    def run(self) -> Report:
        start = time.monotonic()
        with ThreadPoolExecutor(len(self._verdicts)) as self._pool:
            try:
                self._connect()
                for stage in (self._look, self._compare, self._meet, self._names, self._share, self._all_reduce):
                    try:
                        stage()
                    except HostError as error:  # of a question that only the first host is asked
                        self._first.fail(error)
            finally:
                close_all(self._links.values())
        self._report.seconds = time.monotonic() - start
        return self._report

    def _reached(self) -> Iterator[Verdict]:
        return (verdict for verdict in self._verdicts if verdict.facts)

    def _left(self, most_s: float) -> float:
        """Returns the seconds that a question may take. `most_s` is for the usual --seconds, and grows with them."""
        longer = max(1.0, self._config.seconds / HostCheckConfig.seconds)
        return min(most_s * longer, self._deadline - time.monotonic())

    def _ask(self, verdict: Verdict, do: str, *, most_s: float = ANSWER_S, **arguments: Any) -> dict[str, Any]:
        return self._links[verdict.host].ask(do, within_s=self._left(most_s), **arguments)

    def _each(self, ask: Callable[[Verdict], None], verdicts: Sequence[Verdict]) -> None:
        """Asks side by side; who fails to answer is out of the later stages."""

        def guarded(verdict: Verdict) -> None:
            try:
                ask(verdict)
            except HostError as error:
                verdict.fail(error)

        list(self._pool.map(guarded, verdicts))

    def _connect(self) -> None:
        for verdict in self._verdicts:
            try:
                self._links[verdict.host] = HostLink(verdict.host, env=self._env, ssh_port=self._config.ssh_port)
            except HostError as error:
                verdict.fail(error)

    def _look(self) -> None:
        """Asks each host for its facts."""

        def ask(verdict: Verdict) -> None:
            verdict.facts = self._ask(verdict, "facts", most_s=FACTS_S, root=str(ROOT), cwd=str(Path.cwd()))
            verdict.clock_ahead_s, _ = self._links[verdict.host].clock_offset(within_s=self._left(ANSWER_S))
            known = [a for a in (verdict.facts["reached_at"], *verdict.facts["addresses"]) if a]
            verdict.address = next((address for address in known if not _is_loopback(address)), None)

        self._each(ask, [verdict for verdict in self._verdicts if verdict.host in self._links])

    def _compare(self) -> None:
        """Compares each host with the first one that was reached."""
        model = next(self._reached(), None)
        if model is None:
            return
        base = model.clock_ahead_s
        with_gpus = any(verdict.facts["gpus"] for verdict in self._reached())
        for verdict in self._reached():
            facts = verdict.facts
            if not facts["has_cwd"]:
                verdict.wrong.append(f"there is no {Path.cwd()}, where the launcher starts every rank; create it there")
            if facts["code"] is None:
                verdict.wrong.append(f"mapdistill is not in {ROOT}; install it at the same path")
            elif facts["code"] != model.facts["code"]:
                verdict.wrong.append(f"mapdistill's code differs from {model.host}'s; bring {ROOT} to the same commit")
            if facts["python"] != model.facts["python"]:
                verdict.wrong.append(
                    f"Python {facts['python']}, but {model.facts['python']} on {model.host}; make {sys.executable} the "
                    "same version"
                )
            for package in COMPARED:
                version, first = facts["packages"][package], model.facts["packages"][package]
                remedy = f"{sys.executable} -m pip install {package if first is None else f'{package}=={first}'}"
                if version is None:
                    verdict.wrong.append(f"{package} is missing; {remedy}")
                elif first is not None and version != first:
                    verdict.wrong.append(f"{package} {version}, but {first} on {model.host}; {remedy}")
            if with_gpus and facts["gpus"] < verdict.slots:
                verdict.wrong.append(
                    f"slots={verdict.slots}, but it has {facts['gpus']} GPUs; correct the hostfile, or put "
                    "DS_ACCELERATOR=cpu into .deepspeed_env to train on processors"
                )
            verdict.clock_ahead_s -= base
            if abs(verdict.clock_ahead_s) > CLOCK_S:
                verdict.doubtful.append(
                    f"its clock is {verdict.clock_ahead_s:+.1f} s off {model.host}'s; run an NTP client (chrony)"
                )

    def _meet(self) -> None:
        """Lets the others visit the first host's port, at the address that DeepSpeed will tell them."""
        first = self._first
        if not first.facts:
            return
        announced = next(iter(first.facts["addresses"]), None)
        if announced is None:
            first.wrong.append(
                "`hostname -I`, which DeepSpeed asks for its address, prints nothing; give --master_addr"
            )
            announced = first.address
        others = [verdict for verdict in self._reached() if verdict is not first]
        candidates = [address for address in dict.fromkeys((announced, first.address)) if address is not None]
        sources: list[str] = []

        def visit(verdict: Verdict) -> None:
            failed: dict[str, str] = {}
            for address in candidates:
                answer = self._ask(verdict, "visit", address=address, port=port, timeout_s=5.0)
                if answer["error"] is None and answer["name"] == first.facts["name"]:
                    sources.append(answer["from"])
                    # ssh may have come through another network, which the ranks do not use
                    first.address, verdict.address = address, answer["from"]
                    verdict.interface = verdict.interface_at(answer["from"])
                    if failed:
                        verdict.wrong.append(
                            f"cannot reach {first.host} at {announced}, which DeepSpeed takes from `hostname -I`; give "
                            f"--master_addr {address}"
                        )
                    return
                failed[address] = answer["error"] or f"the answer came from {answer['name']!r}"
            listed = ", ".join(f"{address}: {why}" for address, why in failed.items())
            verdict.wrong.append(f"cannot reach {first.host}'s port {port} ({listed}); open the firewall between them")

        port = self._listen(first)
        self._each(visit, others)
        self._ask(first, "hang_up")
        own = self._ask(first, "route", address=sources[0])["from"] if sources else first.address
        first.interface = first.interface_at(own)

    def _listen(self, first: Verdict) -> int:
        """Returns the port on which the first host listens."""
        port = self._config.master_port
        if not self._ask(first, "listen", port=port)["taken"]:
            return port
        free = self._free_port(first)
        first.wrong.append(
            f"port {port} is taken; give --master_port {free}, or end the process that uses it (`ss -ltnp`)"
        )
        return free

    def _free_port(self, first: Verdict) -> int:
        """Returns a port on which the first host listens. Raises HostError where it cannot."""
        answer = self._ask(first, "listen", port=0)
        if answer["taken"]:
            raise HostError("it cannot listen at any port", "look at its limits on open files (`ulimit -n`)")
        return int(answer["port"])

    def _names(self) -> None:
        """Checks where gloo will listen: without an interface named, at the address that the host's own name has on the
        host itself."""
        reached = list(self._reached())
        names = {verdict.interface for verdict in reached if verdict.interface is not None}
        common = names.pop() if len(names) == 1 else None
        for verdict in reached if len(self._verdicts) > 1 else []:
            if verdict.facts["gloo_interface"]:
                self._check_chosen(verdict, verdict.facts["gloo_interface"])
                continue
            at = verdict.facts["name_is"]
            if at is not None and not _is_loopback(at) and verdict.interface_at(at) is not None:
                continue
            where = f"is {at} to itself" if at else "has no address there"
            remedy = f"give {verdict.facts['name']} the address {verdict.address} in its /etc/hosts"
            if common is not None:
                with_gpus = f" (with GPUs NCCL_SOCKET_IFNAME={common} too)"
                remedy = f"put {INTERFACE}={common} into .deepspeed_env{with_gpus}, or {remedy}"
                self._report.settings[INTERFACE] = common
            verdict.wrong.append(f"its name {verdict.facts['name']} {where}, where gloo would listen; {remedy}")

    def _check_chosen(self, verdict: Verdict, chosen: str) -> None:
        known = verdict.facts["interfaces"]
        if not set(chosen.split(",")) <= known.keys():
            listed = ", ".join(name for name in known if name != "lo") or "none"
            verdict.wrong.append(f"{INTERFACE}={chosen}, but only these are up: {listed}; correct .deepspeed_env")
        elif verdict.interface is not None and verdict.interface not in chosen.split(","):
            verdict.doubtful.append(
                f"{INTERFACE}={chosen}, but {verdict.interface} leads to the other hosts; correct .deepspeed_env"
            )

    def _share(self) -> None:
        """Checks whether the other hosts see a file that the first one writes (--shared)."""
        folder, first = self._config.shared, self._first
        if folder is None or not first.facts:
            return
        path, text = f"{folder}/.check_hosts_{secrets.token_hex(8)}", secrets.token_hex(16)

        def look(verdict: Verdict) -> None:
            if not self._ask(verdict, "read", path=path, text=text, timeout_s=self._left(5.0))["seen"]:
                verdict.wrong.append(f"a file that {first.host} wrote in {folder} is not there; mount the same storage")

        error = self._ask(first, "write", path=path, text=text)["error"]
        if error is not None:
            first.wrong.append(f"cannot write in {folder}: {error}")
            return
        self._each(look, [other for other in self._reached() if other is not first])
        self._ask(first, "remove", path=path)

    def _all_reduce(self) -> None:
        """Tries an all-reduce, with what is missing in .deepspeed_env already set, so that it says whether the remedy
        works."""
        verdicts, first = self._verdicts, self._first
        wrong = [text for verdict in verdicts for text in verdict.wrong]
        if len(verdicts) < 2 or any(not (self._report.settings and INTERFACE in text) for text in wrong):
            return
        backend = "nccl" if all(verdict.facts["gpus"] for verdict in verdicts) else "gloo"
        answers: dict[str, dict[str, Any]] = {}
        port = self._free_port(first)
        self._ask(first, "hang_up")
        limit = max(1.0, self._left(math.inf) - 2.0)  # so that an agent can say that it waited in vain

        def reduce(verdict: Verdict) -> None:
            rank = {
                "RANK": str(verdicts.index(verdict)),
                "WORLD_SIZE": str(len(verdicts)),
                "MASTER_ADDR": str(first.address),  # where the others have met it
                "MASTER_PORT": str(port),
                **self._report.settings,
            }
            arguments = {"root": str(ROOT), "env": rank, "backend": backend, "timeout_s": limit}
            answers[verdict.host] = self._ask(verdict, "all_reduce", most_s=math.inf, **arguments)

        self._each(reduce, verdicts)
        failed = {host: answer["error"] for host, answer in answers.items() if answer["error"] is not None}
        if failed or len(answers) < len(verdicts):
            complaint = "; ".join(f"{host}: {why}" for host, why in failed.items()) or "a host did not answer"
            self._report.all_reduce = {"backend": backend, "error": complaint}
        else:
            self._report.all_reduce = {"backend": backend, **answers[first.host]}


def _is_loopback(address: str) -> bool:
    """Returns True also for what is no address, as sshd says UNKNOWN of a connection through a proxy command."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True
