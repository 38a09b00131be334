"""The driver's loop: claims trials, runs them as jobs on every free slot, and writes down what became of them; how
it is told to stop, and when it gives up."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

from engine.config.proxy import ProxyConfig
from engine.errors import RunFailure, UserError, first_line
from ga.config import SearchConfig
from ga.jobs.launcher import LOG
from ga.jobs.outcome import JobReport, Outcome
from ga.jobs.pool import JobPool, Running
from ga.jobs.slots import Placement
from ga.study.drivers import Drivers
from ga.study.evaluations import RUNNING, STOPPED_EARLY, Evaluation
from ga.study.ledger import Claim, Ledger
from ga.study.storage import transient

POLL_S = 0.2
ASK_AGAIN_S = 3.0
"""Seconds between questions for work while other drivers have what there is."""
MOST_LOST_AT_START = 2
"""Number of jobs, from the first of a study on, after which a driver gives up when they are lost before they begin."""
OUTAGE_S = 600.0
"""Seconds that the storage may not answer before the driver gives up."""

Answer = TypeVar("Answer")


class Interrupted(Exception):
    """The driver was told to stop; its jobs are ended, their trials open."""


class GivenUp(RunFailure):
    """Nothing gets a fitness."""


def give_up_after_failures(evaluations: Sequence[Evaluation], *, since: datetime.datetime, most: int) -> None:
    """Raises GivenUp when the last `most` genomes that were evaluated since then got no fitness. since: when this
    driver began: whoever starts it again after a failure wants it to try."""
    finished = [one for one in evaluations if one.finished is not None and one.finished >= since]
    finished = [one for one in finished if one.counts and one.outcome not in (RUNNING, STOPPED_EARLY)]
    finished.sort(key=lambda one: one.finished or since)
    last = finished[-most:]
    if len(last) == most and all(one.fitness is None for one in last):
        raise GivenUp(
            f"the last {len(last)} genomes got no fitness, the last one: {last[-1].outcome}, {last[-1].message}. "
            f"Look into {last[-1].job}; search.max_failures sets after how many a search gives up"
        )


@dataclass
class Loop:
    """Evaluates what a ledger offers until that is over."""

    config: SearchConfig
    ledger: Ledger
    pool: JobPool
    drivers: Drivers
    stop: Callable[[], bool]
    say: Callable[[str], None]
    proxy: Callable[[], ProxyConfig]
    """Settings of the next job."""
    changed: Callable[[], object]
    """Callback after jobs have finished, and every few seconds. May raise GivenUp."""
    folders: Path
    """Folder of the job folders, which are named after the first of their trials."""
    only_first: bool = False
    """Whether the first job ends it; one that did not fit into memory is none."""

    def __post_init__(self) -> None:
        self.cohort = self.config.search.cohort
        self._has_settled = False
        self._lost_at_start = 0
        self._claims: dict[Path, list[Claim]] = {}
        self._ask_at = 0.0

    def run(self) -> None:
        """Runs jobs until the ledger is over. Raises Interrupted, GivenUp, and UserError when a job does not accept
        its configuration."""
        try:
            while not self.stop():
                self.ask_patiently(self.drivers.beat)
                if self._finish_jobs() or time.monotonic() >= self._ask_at:
                    self.ask_patiently(self.changed)
                    if self.only_first and self._has_settled:
                        return
                    self._start_jobs()
                    self._ask_at = time.monotonic() + ASK_AGAIN_S
                    if not self.pool.running and self.ask_patiently(self.ledger.is_over):
                        return
                time.sleep(POLL_S)
            raise Interrupted
        finally:
            self._end_jobs()

    def ask_patiently(self, call: Callable[[], Answer]) -> Answer:
        """Asks a storage that does not answer again for a while: jobs go on meanwhile."""
        since, said = time.monotonic(), False
        while True:
            try:
                return call()
            except Exception as error:
                if not transient(error):
                    raise
                if self.stop():
                    raise Interrupted from None
                why = first_line(error)
                if time.monotonic() - since > OUTAGE_S:
                    raise UserError(
                        f"search.storage has not answered for {OUTAGE_S / 60:.0f} minutes ({why}). What jobs have "
                        "recorded is in their folders; the same command continues"
                    ) from None
                if not said:
                    self.say(f"the storage does not answer ({why}); trying again")
                    said = True
                time.sleep(ASK_AGAIN_S)

    def _start_jobs(self) -> None:
        """Fills the free slots, as far as there is work."""
        for placement in self.pool.free:
            if self.only_first and self.pool.running:
                break
            share = math.ceil(self.ask_patiently(self.ledger.batch) / self.ask_patiently(self.drivers.all_placements))
            limit = max(1, min(self.cohort, share))
            claims = self.ask_patiently(functools.partial(self.ledger.claim, limit))
            if not claims:
                break
            self._start_job(placement, claims)

    def _start_job(self, placement: Placement, claims: list[Claim]) -> None:
        folder = self._new_folder(claims[0].number)
        job = self.config.job(
            output_dir=str(folder.resolve()),
            genomes=[claim.genome for claim in claims],
            seed=claims[0].seed,
            proxy=self.ask_patiently(self.proxy),
        )
        try:
            self.ask_patiently(lambda: self.ledger.begin(claims, folder))
            self.pool.start(placement, job)
        except (UserError, OSError):
            self.ask_patiently(lambda: self.ledger.release(claims))
            raise
        self._claims[folder.resolve()] = claims

    def _new_folder(self, number: int) -> Path:
        """Returns the folder of a new job: trials/00012, or trials/00012-2 where a job of that trial was lost."""
        names = (f"{number:05d}" + (f"-{start}" if start > 1 else "") for start in itertools.count(1))
        return next(folder for name in names if not (folder := self.folders / name).exists())

    def _finish_jobs(self) -> bool:
        """Settles the jobs that have ended; returns whether there was any."""
        any_ended = False
        for running, report in self.pool.finished():
            any_ended = True
            self.ask_patiently(self.drivers.beat)
            claims = self._claims.pop(running.folder)
            if Outcome.BAD_CONFIGURATION in report.outcomes.values() or self._cannot_start(report):
                self._give_back(running, claims, report)
                raise UserError(f"{report.message} (from the log of a job: {running.folder / LOG})")
            again = self._too_many_for_memory(claims, report)
            self.ask_patiently(functools.partial(self.ledger.release, again))
            self._settle(running, [claim for claim in claims if claim not in again], report)
        return any_ended

    def _cannot_start(self, report: JobReport) -> bool:
        """Tells whether jobs are lost before they begin, and none of the study has ever begun: the launcher, the hosts
        or the installation is at fault, and no genome."""
        if report.fingerprint is not None or self.ledger.has_begun or Outcome.LOST not in report.outcomes.values():
            return False
        self._lost_at_start += 1
        return self._lost_at_start == MOST_LOST_AT_START

    def _settle(self, running: Running, claims: Sequence[Claim], report: JobReport) -> None:
        self._has_settled = self._has_settled or bool(claims)
        self.ask_patiently(
            lambda: self.ledger.finish(claims, report, seconds=running.seconds, cohort=len(running.genomes))
        )
        if any(report.outcomes[claim.genome] not in (Outcome.OK, Outcome.STOPPED) for claim in claims):
            self.say(f"{running.folder}: {report.message}")

    def _too_many_for_memory(self, claims: Sequence[Claim], report: JobReport) -> list[Claim]:
        """Returns the claims to try again in a smaller cohort: it was not any of them alone that did not fit."""
        short = [claim for claim in claims if report.outcomes[claim.genome] is Outcome.OUT_OF_MEMORY]
        if not short or len(claims) == 1:
            return []
        self.cohort = min(self.cohort, len(claims) // 2)
        self.say(f"out of memory with {len(claims)} students side by side; going on with {self.cohort}")
        return short

    def _give_back(self, running: Running, claims: Sequence[Claim], report: JobReport) -> None:
        """Settles a job that was ended in the middle: results count, the rest is open. Tries once: the next driver
        reads the folder anyway."""
        done = [claim for claim in claims if report.outcomes[claim.genome] in (Outcome.OK, Outcome.STOPPED)]
        self.ledger.finish(done, report, seconds=running.seconds, cohort=len(running.genomes))
        self.ledger.release([claim for claim in claims if claim not in done])

    def _end_jobs(self) -> None:
        """Ends all jobs, before the storage is asked for anything."""
        for running, report in self.pool.end_all():
            try:
                self._give_back(running, self._claims.pop(running.folder), report)
            except Exception as error:
                if not transient(error):
                    raise
                self.say("the storage does not answer; what jobs have recorded is in their folders")
                return


_STDERR = 2


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for an orderly end; a second one kills the jobs, but for SIGHUP: a terminal that
    goes often sends two. Only Python's main thread hears them."""

    def __init__(self, pool: JobPool) -> None:
        self._pool = pool
        self._first: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = number
            if self._pool.running:
                with contextlib.suppress(OSError):  # it would be raised wherever the driver is just now
                    os.write(_STDERR, b"stopping: jobs are told to end; a second signal kills them\n")
        elif number != signal.SIGHUP:
            self._pool.kill()

    @property
    def requested(self) -> bool:
        return self._first is not None
