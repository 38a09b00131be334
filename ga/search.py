"""The search, from its configuration to its report. All that it decides is in the storage, so that it goes on where
an earlier driver was killed, and beside others."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna

from engine.config.proxy import ProxyConfig
from engine.errors import EXIT_CRASH, EXIT_DONE, UserError
from engine.records.run_dir import RunDir
from ga.config import STUDY_FILE, SearchConfig
from ga.dry_run import describe_search, end_lost_measurement, measured_evaluations, rehearse
from ga.evolution.genome import Space
from ga.jobs.pool import JobPool, find_placements
from ga.jobs.proxy_facts import ProxyFacts, ask_proxy
from ga.loop import GivenUp, Interrupted, Loop, StopSignals, give_up_after_failures
from ga.report.write import publish
from ga.study.drivers import Driver, Drivers
from ga.study.evaluations import ranked, read_history
from ga.study.ledger import Ledger, known_evaluations
from ga.study.sources import ConfirmationSource, SearchSource
from ga.study.storage import SearchStorage, open_storage
from ga.study.studies import COMPARABLE, load_search, open_confirmation, open_search, search_space
from ga.view.live import Show
from ga.view.progress import status_text

TRIALS, CONFIRMATIONS = "trials", "confirmations"
"""Folders of job folders."""


def search(config: SearchConfig) -> int:
    """Runs a search to its report; returns the exit code. Raises UserError."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.status:
        return print_status(config)
    try:
        config.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir!r} cannot be made: {error}") from None
    end_lost_measurement(config)
    pool = JobPool(
        find_placements(
            hostfile=config.hostfile,
            local_slots=config.search.local_slots,
            slots_per_job=config.search.slots_per_job,
            launcher=config.search.launcher,
        ),
        launcher=config.search.launcher,
        hostfile=None if config.hostfile is None else Path(config.hostfile),
        limit_s=60 * config.search.job_minutes,
    )
    print(f"asking a proxy job on {pool.placements[0]} what it would do ...", flush=True)
    with StopSignals(pool) as stop:
        facts = ask_proxy(pool, config, stop=lambda: stop.requested)
        if facts is None:
            return stop.exit_code
        space = search_space(config, student_layers=facts.student_layers, teacher_layers=facts.teacher_layers)
        check_budget(config, space)
        if config.dry_run:
            rehearse(config, space, facts, pool, stop=lambda: stop.requested)
            return stop.exit_code if stop.requested else EXIT_DONE
        storage = open_storage(config.storage)
        try:
            return Search(config, storage, space, facts, pool, stop).run()
        finally:
            storage.close()


def check_budget(config: SearchConfig, space: Space) -> None:
    """Raises UserError for an exhaustive search that would not be one."""
    if config.search.sampler == "exhaustive" and config.search.trials < space.size():
        raise UserError(
            f"search.trials={config.search.trials}: the space has {space.size():,} genomes; write search.trials="
            f"{space.size()}, narrow it with search.constraint, or take another search.sampler"
        )


def print_status(config: SearchConfig) -> int:
    if config.search.storage is None and not (config.root / STUDY_FILE).is_file():
        raise UserError(f"output_dir={config.output_dir!r}: no search was begun there ({STUDY_FILE} is missing)")
    storage = open_storage(config.storage, existing=True)
    try:
        study = load_search(storage, config)
        print(status_text(study, storage.shown_url, trials=config.search.trials))
    finally:
        storage.close()
    return EXIT_DONE


@dataclass
class Search:
    config: SearchConfig
    storage: SearchStorage
    space: Space
    facts: ProxyFacts
    pool: JobPool
    stop: StopSignals
    began: datetime.datetime = field(default_factory=datetime.datetime.now)

    def run(self) -> int:
        source = open_search(self.storage, self.config, self.space, self.facts)
        drivers = Drivers(source.study, Driver.this_process(), placements=len(self.pool.placements))
        shown = replace(self.config.search, storage=self.storage.shown_url)
        RunDir(self.config.root).write_settings(replace(self.config, search=shown))
        try:
            evaluations = read_history(source.study)
            print(describe_search(self.config, self.space, self.facts, self.pool.placements, evaluations), flush=True)
            with Show(self.config, self.space, source.study, tasks=self.facts.tasks) as show:
                self._evaluate(source, drivers, show)
                self._confirm(source, show)
                publish(self.config, self.storage, source.study, self.space, self.facts, say=show.say)
            if not ranked(read_history(source.study)):
                raise GivenUp("no genome got a fitness; the report's leaderboard says why of each")
        except Interrupted:
            print("stopped; the same command goes on", file=sys.stderr, flush=True)
            return self.stop.exit_code
        except GivenUp as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return EXIT_CRASH
        finally:
            drivers.leave()
        return EXIT_DONE

    def _evaluate(self, source: SearchSource, drivers: Drivers, show: Show) -> None:
        known = known_evaluations(self.storage, source.study, COMPARABLE)
        known |= measured_evaluations(self.config, self.facts)
        ledger = Ledger(self.storage, source, drivers, known=known)
        self._loop(ledger, drivers, show, folders=self.config.root / TRIALS, proxy=lambda: self._proxy(source)).run()
        self._look(show, over=True)

    def _look(self, show: Show, *, over: bool = False) -> None:
        """Raises GivenUp when too many genomes in a row got no fitness."""
        give_up_after_failures(show.update(over=over), since=self.began, most=self.config.search.max_failures)

    def _proxy(self, source: SearchSource) -> ProxyConfig:
        """With the thresholds of halving, as things are."""
        proxy, rate = self.config.proxy, self.config.search.halving
        if rate is None:
            return proxy
        thresholds: dict[int, float] = {}
        for step in proxy.report_at:
            scores = sorted(one.reports[step] for one in read_history(source.study) if step in one.reports)
            if len(scores) >= rate:
                thresholds[step] = scores[-int(len(scores) / rate)]
        return replace(proxy, stop_below=thresholds)

    def _confirm(self, source: SearchSource, show: Show) -> None:
        """Runs the best genomes and uniform again with seeds that the search has not seen."""
        s = self.config.search
        best = [one.genome for one in ranked(read_history(source.study))[: s.confirm_top]]
        if not best:
            return
        reference = self.space.text(self.space.heuristics()["uniform"])
        study = open_confirmation(self.storage, self.config, self.facts)
        confirmation = ConfirmationSource(study, self.space)
        first = self.config.seed + self.config.proxy.repeats
        with self.storage.lock():
            for seed in range(first, first + s.confirm_seeds):
                for genome in dict.fromkeys([*best, reference]):
                    confirmation.add(genome, seed)
        drivers = Drivers(study, Driver.this_process(), placements=len(self.pool.placements))
        try:
            if any(not trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
                genomes = " ".join(dict.fromkeys([*best, reference]))
                show.say(f"confirmation: {genomes} with {s.confirm_seeds} new seeds")
            proxy = replace(self.config.proxy, repeats=1, report_at=[])
            ledger = Ledger(self.storage, confirmation, drivers)
            self._loop(ledger, drivers, show, folders=self.config.root / CONFIRMATIONS, proxy=lambda: proxy).run()
        finally:
            drivers.leave()

    def _loop(
        self, ledger: Ledger, drivers: Drivers, show: Show, *, folders: Path, proxy: Callable[[], ProxyConfig]
    ) -> Loop:
        return Loop(
            config=self.config,
            ledger=ledger,
            pool=self.pool,
            drivers=drivers,
            stop=lambda: self.stop.requested,
            say=show.say,
            proxy=proxy,
            changed=lambda: self._look(show),
            folders=folders,
        )
