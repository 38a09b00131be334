"""The search, from its configuration to its report. All that it decides is in the storage, so that it goes on where
an earlier driver was killed, and beside others."""

from __future__ import annotations

import datetime
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna import Study

from engine.config.proxy import ProxyConfig
from engine.errors import Preempted, UserError
from engine.jobs.proxy.facts import ProxyFacts, read_facts
from engine.records.run_dir import RunDir
from engine.records.yardstick import Yardstick, describe_yardstick
from ga.config import SearchConfig
from ga.dry_run import describe_search, estimate
from ga.evolution.genome import Space
from ga.jobs.launcher import LOG
from ga.jobs.pool import JobPool, find_placements
from ga.loop import GivenUp, Interrupted, Loop, StopSignals, give_up_after_failures
from ga.report.write import publish
from ga.study.drivers import Driver, Drivers
from ga.study.evaluations import Evaluation, rank_evaluations, read_history
from ga.study.ledger import Ledger
from ga.study.proxy_identity import adopt_proxy
from ga.study.sources import ListSource, SearchSource, confirmation_name
from ga.study.storage import SearchStorage, explain_errors, open_storage
from ga.study.studies import (
    known_evaluations,
    open_list,
    open_search,
    search_space,
)
from ga.study.yardstick import (
    KEPT,
    Measured,
    given_yardstick,
    measure_yardstick,
    reusable_evaluations,
    yardstick_genomes,
    yardstick_name,
    yardstick_seeds,
    yardstick_space,
)
from ga.view.live import LiveView
from ga.view.status import print_status

YARDSTICK, TRIALS, CONFIRMATIONS = "yardstick", "trials", "confirmations"
"""Folders of job folders."""


def search(config: SearchConfig) -> None:
    """Runs a search to its report. Raises GivenUp when no genome gets a fitness, Preempted, and UserError."""
    with explain_errors(config.storage, config.output_dir):
        _search(config)


def _search(config: SearchConfig) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.status:
        print_status(config)
        return
    if importlib.util.find_spec("matplotlib") is None:  # needed at the end, after days
        raise UserError("the search's report needs the Python package 'matplotlib'; pip install matplotlib")
    try:
        config.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir!r} cannot be made: {error}") from None
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
    with StopSignals(pool) as stop:
        facts = read_facts(config.job(output_dir=str(config.root), genomes=["none"]))
        space = search_space(config, student_layers=facts.student_layers, teacher_layers=facts.teacher_layers)
        check_budget(config, space)
        storage = open_storage(config.storage)
        try:
            Search(config, storage, space, facts, pool, stop).run()
        finally:
            storage.close()


def _preempted(config: SearchConfig) -> Preempted:
    print("stopped; the same command continues", file=sys.stderr, flush=True)
    return Preempted(f"{config.output_dir}: stopped; the same call continues")


def check_budget(config: SearchConfig, space: Space) -> None:
    """Raises UserError for an exhaustive search that would not be one."""
    if config.search.sampler == "exhaustive" and config.search.trials < space.size():
        raise UserError(
            f"search.trials={config.search.trials}: the space has {space.size():,} genomes; write search.trials="
            f"{space.size()}, narrow it with search.constraint, or take another search.sampler"
        )


@dataclass
class Search:
    config: SearchConfig
    storage: SearchStorage
    space: Space
    facts: ProxyFacts
    pool: JobPool
    stop: StopSignals
    began: datetime.datetime = field(default_factory=datetime.datetime.now)

    def run(self) -> None:
        source = self._source()
        drivers = Drivers(source.study, Driver.this_process(), placements=len(self.pool.placements))
        try:
            evaluations = read_history(source.study)
            print(describe_search(self.config, self.space, self.facts, self.pool.placements, evaluations), flush=True)
            with LiveView(self.config, self.space, source.study, tasks=self.facts.tasks) as view:
                (self._rehearse if self.config.dry_run else self._search)(source, drivers, view)
        except Interrupted:
            raise _preempted(self.config) from None
        finally:
            drivers.leave()

    def _source(self) -> SearchSource:
        if self.config.dry_run and given_yardstick(self.config) is None:  # its one job binds no setting of the search
            study = optuna.create_study(direction="maximize")
            return SearchSource(study, self.space, self.config.search, proxy_seed=self.config.seed)
        return open_search(self.storage, self.config, self.space, self.facts)

    def _search(self, source: SearchSource, drivers: Drivers, view: LiveView) -> None:
        shown = replace(self.config.search, storage=self.storage.shown_url)
        RunDir(self.config.root).write_settings(replace(self.config, search=shown))
        yardstick, known = self._yardstick(source, drivers, view)
        with view.search_stage():
            self._evaluate(source, drivers, view, yardstick, known)
            self._look(view, over=True)
        self._confirm(source, drivers, view, yardstick)
        with self.storage.lock():  # of drivers that end together one writes after the other
            publish(self.config, self.storage, source.study, self.space, self.facts, yardstick, say=view.say)
        if not rank_evaluations(read_history(source.study)):
            raise GivenUp("no genome got a fitness; the report's leaderboard says why of each")

    def _rehearse(self, source: SearchSource, drivers: Drivers, view: LiveView) -> None:
        """Evaluates the first job, unless its study holds a result, and says what all of them will take."""
        own = given_yardstick(self.config)
        study = self._yardstick_study() if own is None else source.study
        if not rank_evaluations(read_history(study)):
            view.say("running the first job to measure its cost ...")
            if own is None:
                self._measure(study, drivers, view)
            else:
                self._evaluate(source, drivers, view, own, {})
        scored = [one for one in read_history(study) if one.fitness is not None]
        if not scored:
            raise UserError(f"the first job gave no fitness: see {self.config.root}/*/*/{LOG}")
        paid = [one for one in scored if one.seconds] or scored
        unfinished = sum(not trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        yardstick = 0 if own is not None else unfinished
        view.say(estimate(self.config, source, paid, self.pool.placements, of_yardstick=yardstick))

    def _yardstick_study(self) -> Study:
        return open_list(self.storage, yardstick_name(self.facts.fingerprint, self.config.seed))

    def _measure(self, study: Study, drivers: Drivers, view: LiveView) -> None:
        """Evaluates the genomes of the yardstick."""
        self._run_list(
            study,
            drivers,
            yardstick_space(self.space),
            {genome: yardstick_seeds(self.config) for genome in yardstick_genomes(self.space)},
            view,
            folders=self.config.root / YARDSTICK,
            proxy=replace(self.config.proxy, repeats=1, report_at=[], other_tasks=[]),
            yardstick={},
            name="yardstick",
        )

    def _yardstick(
        self, source: SearchSource, drivers: Drivers, view: LiveView
    ) -> tuple[Measured, dict[str, Evaluation]]:
        """Returns what fitness is measured by, kept in the study, and the evaluations that measuring it has brought.
        Raises GivenUp when there is nothing to measure it by."""
        if (own := given_yardstick(self.config)) is not None:
            return own, {}
        study = self._yardstick_study()
        self._measure(study, drivers, view)
        with self.storage.lock():
            kept = source.study.user_attrs.get(KEPT)
            found = measure_yardstick(study, yardstick_seeds(self.config)) if kept is None else Measured.of(kept)
            if found is None:
                raise GivenUp(
                    f"none of {', '.join(yardstick_genomes(self.space))} got a score: see {YARDSTICK}/*/output.log"
                )
            adopt_proxy(source.study, study)
            if kept is None:
                source.study.set_user_attr(KEPT, found.kept())
                view.say(f"fitness: {describe_yardstick(found.scales)}")
                if not found.noise:
                    view.say("too few of them have scores to tell noise from mappings: all tasks have the same weight")
        if self.config.proxy.report_at:  # they have no intermediate scores by this yardstick
            return found, {}
        return found, reusable_evaluations(study, found, yardstick_seeds(self.config)[: self.config.proxy.repeats])

    def _evaluate(
        self,
        source: SearchSource,
        drivers: Drivers,
        view: LiveView,
        yardstick: Measured,
        known: Mapping[str, Evaluation],
    ) -> None:
        known = {**known, **known_evaluations(self.storage, source.study)}
        ledger = Ledger(self.storage, source, drivers, yardstick=yardstick.scales, known=known)
        self._loop(
            ledger,
            drivers,
            view,
            folders=self.config.root / TRIALS,
            proxy=lambda: self._proxy(source, yardstick),
            changed=lambda: self._look(view),
        ).run()

    def _look(self, view: LiveView, *, over: bool = False) -> None:
        """Raises GivenUp when too many genomes in a row got no fitness."""
        give_up_after_failures(view.update(over=over), since=self.began, most=self.config.search.max_failures)

    def _proxy(self, source: SearchSource, yardstick: Measured) -> ProxyConfig:
        """Returns the settings of the next job, with the thresholds of halving as things are."""
        rate = self.config.search.halving
        proxy = replace(self.config.proxy, yardstick=dict(yardstick.scales), other_tasks=[])
        if rate is None:
            return proxy
        thresholds: dict[int, float] = {}
        for step in proxy.report_at:
            scores = sorted(one.reports[step] for one in read_history(source.study) if step in one.reports)
            if len(scores) >= rate:
                thresholds[step] = scores[-int(len(scores) / rate)]
        return replace(proxy, stop_below=thresholds)

    def _confirm(self, source: SearchSource, drivers: Drivers, view: LiveView, yardstick: Measured) -> None:
        """Runs the best genomes beside uniform, and uniform, again with seeds that the search has not seen."""
        s = self.config.search
        reference = self.space.text(self.space.heuristics()["uniform"])
        best = [one.genome for one in rank_evaluations(read_history(source.study)) if one.genome != reference]
        best = best[: s.confirm_top]
        if not best:
            return
        first = yardstick_seeds(self.config).stop
        study = open_list(self.storage, confirmation_name(self.config.study, self.facts.fingerprint))
        with self.storage.lock():
            adopt_proxy(study, source.study)
        self._run_list(
            study,
            drivers,
            self.space,
            dict.fromkeys([*best, reference], range(first, first + s.confirm_seeds)),
            view,
            folders=self.config.root / CONFIRMATIONS,
            proxy=replace(
                self.config.proxy, repeats=1, report_at=[], layer_table=True, yardstick=dict(yardstick.scales)
            ),
            yardstick=yardstick.scales,
            name="confirmation",
        )

    def _run_list(
        self,
        study: Study,
        searching: Drivers,
        space: Space,
        wanted: Mapping[str, range],
        view: LiveView,
        *,
        folders: Path,
        proxy: ProxyConfig,
        yardstick: Yardstick,
        name: str,
    ) -> None:
        """Evaluates each of these genomes with each of its seeds, as trials of `study`. searching: the drivers of the
        search itself, whose study this one still drives."""
        source = ListSource(study, space)
        with self.storage.lock():
            for seed, genome in sorted((seed, place) for place, seeds in enumerate(wanted.values()) for seed in seeds):
                source.add(list(wanted)[genome], seed)
        if all(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            return
        drivers = Drivers(study, Driver.this_process(), placements=len(self.pool.placements))

        def changed() -> None:
            searching.beat()
            view.count()

        try:
            with view.list_stage(study, name=name):
                seeds = sorted({seed for seeds in wanted.values() for seed in seeds})
                view.say(f"{name}: {' '.join(wanted)} with seeds {', '.join(map(str, seeds))}")
                ledger = Ledger(self.storage, source, drivers, yardstick=yardstick)
                self._loop(ledger, drivers, view, folders=folders, proxy=lambda: proxy, changed=changed).run()
        finally:
            drivers.leave()

    def _loop(
        self,
        ledger: Ledger,
        drivers: Drivers,
        view: LiveView,
        *,
        folders: Path,
        proxy: Callable[[], ProxyConfig],
        changed: Callable[[], None],
    ) -> Loop:
        return Loop(
            config=self.config,
            ledger=ledger,
            pool=self.pool,
            drivers=drivers,
            stop=lambda: self.stop.requested,
            say=view.say,
            proxy=proxy,
            changed=(lambda: None) if self.config.dry_run else changed,
            folders=folders,
            only_first=self.config.dry_run,
        )
