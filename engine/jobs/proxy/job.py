"""The proxy job: short distillations of several genomes side by side, each student scored on tasks.

One teacher forward serves every student of the cohort; each has its own optimizer, clipping and loss scaler, and the
same numbers as if it were alone.
"""

from __future__ import annotations

import functools
import gc
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from engine.config.proxy import ProxyJobConfig
from engine.data.shard_check import ShardCheck
from engine.jobs.distill.build import load_teacher, open_corpus
from engine.jobs.proxy.baselines import baselines
from engine.jobs.proxy.checkpoints import Start, StudentCheckpoints
from engine.jobs.proxy.clock import PhaseClock
from engine.jobs.proxy.cohort import Cohort, IntermediateScores, Member, tokens_met
from engine.jobs.proxy.evaluators import Evaluator, Scores, Stopped, build_evaluator
from engine.jobs.proxy.layer_table import LayerTables
from engine.jobs.proxy.plan import Genome, OwnEvaluator, ProxyPlan, make_proxy_plan
from engine.jobs.proxy.report import Result, describe_start
from engine.jobs.proxy.results import Results, listed
from engine.jobs.proxy.teacher_cache import AnyTeacher, CachedTeacher, open_cached_teacher
from engine.losses.base import NO_LOSSES, OwnLosses
from engine.ranks import run_lock, watchdog
from engine.ranks.agreement import require_agreement
from engine.ranks.runtime import Runtime, StopRequest, join_ranks, launcher_rank
from engine.records.fingerprints import flatten
from engine.records.records import OnRecord
from engine.records.run_dir import RunDir
from engine.records.yardstick import equal_scales, fitness_of
from engine.train.monitor import Monitor, peak_memory_gib
from engine.train.trainer import Outcome, Trainer


def proxy(
    config: ProxyJobConfig,
    *,
    own_losses: OwnLosses = NO_LOSSES,
    own_evaluator: OwnEvaluator | None = None,
    on_record: OnRecord | None = None,
    began: float | None = None,
) -> None:
    """Runs the genomes that have no result yet. Collective. Raises Diverged when no genome has one, Preempted when told
    to stop (finished results are recorded, and the same job runs the others), UserError and RunFailure.

    own_losses: losses beside those of the configuration, with their weights. own_evaluator: takes the place of that of
    the configuration. on_record: is called with each record, on rank 0. began: when the job did, in seconds since the
    epoch; unset: with this process, since starting Python and importing are part of what a proxy costs.
    """
    began = psutil.Process().create_time() if began is None else began
    plan = make_proxy_plan(config, own_losses, own_evaluator)
    run_dir = RunDir(Path(config.output_dir))
    writes = launcher_rank() == 0 and not config.dry_run
    with run_lock.hold(run_dir.root, writes=writes):
        if writes:
            run_dir.write_settings(
                config,
                ds_config=plan.base.execution.resolved,
                tokenizer=plan.base.tokenizer,
                beside_tokenizer=None if plan.base.sentence is None else plan.base.sentence.write,
            )
        runtime = join_ranks(config.seed)
        require_agreement({**flatten(plan.fingerprint_parts), **plan.base.execution.facts})
        outcome = ProxyJob(plan, run_dir, runtime, began, on_record).run()
    outcome.require_done(run_dir.root)


class ProxyJob:
    """One start on this rank."""

    def __init__(
        self, plan: ProxyPlan, run_dir: RunDir, runtime: Runtime, began: float, on_record: OnRecord | None = None
    ) -> None:
        """Reads the results of earlier starts. Collective. began: as of `proxy`."""
        self.plan, self.run_dir, self.runtime = plan, run_dir, runtime
        self.config, self._on_record = plan.config, on_record
        self.results = Results(plan, run_dir, runtime, on_record)
        self.clock = PhaseClock(time.time() - began)
        self.stop = StopRequest()
        self._shard_check: ShardCheck | None = None
        """Check of the corpus, which all cohorts read."""
        self._layer_tables = LayerTables(runtime) if self.config.proxy.layer_table else None
        self._checkpoints = StudentCheckpoints(plan, run_dir, runtime) if self.config.proxy.save_every else None

    def run(self) -> Outcome:
        """Runs what is missing and prints the table; returns how it ended. Collective."""
        results = self.results
        results.say(describe_start(self.plan, self.runtime, results.seeds, set(results.known)))
        if self.config.dry_run:
            results.say_record("run", status="planned", **results.facts, **self.plan.facts)
            return Outcome.DONE
        results.open()
        try:
            results.take_yardstick()
            results.record("run", status="started", fingerprint_parts=self.plan.fingerprint_parts)
            if any(results.missing.values()) and not self._run_missing(results.missing):
                results.record("run", status="preempted", signal=self.stop.signal)
                return Outcome.PREEMPTED
            return results.finish(self.clock.seconds)
        finally:
            results.close()

    def _run_missing(self, missing: Mapping[int, Sequence[Genome]]) -> bool:
        """Distils and scores the genomes that have no result; returns False when told to stop. missing: genomes by
        seed. Collective."""
        with self.clock.phase("encode"):
            scratch = self.run_dir.root / "students" / ".scored"
            evaluator = build_evaluator(self.plan, self.runtime, self.stop, scratch)
        if not self.results.yardstick and not self._measure_yardstick(evaluator):
            return False
        with self.clock.phase("load"):
            teacher = self._load_teacher({genome.key: genome for group in missing.values() for genome in group})
        self.clock.share()
        for seed, genomes in missing.items():
            for start in self._divide(genomes, seed):
                self.clock.begin_cohort()
                if not self._run_cohort(start, seed, teacher, evaluator):
                    return False
        if isinstance(teacher, CachedTeacher):
            teacher.close()
        return True

    def _measure_yardstick(self, evaluator: Evaluator) -> bool:
        """Scores the baselines; returns False when told to stop. Collective."""
        scores: dict[str, Scores] = {}
        try:
            with self.clock.phase("baselines"), self._watch_scoring(self.config.seed):
                for name, model in baselines(self.plan.base, self.runtime.device):
                    scores[name] = evaluator(model)
        except Stopped:
            return False
        self.results.yardstick = equal_scales(scores["start"].tasks, scores["teacher"].tasks, self.plan.counted)
        self.results.record("run", status="baselines", **{name: of.tasks for name, of in scores.items()})
        for name, of in scores.items():
            self.results.say(f"{name}  ({listed(of.tasks)})")
        return True

    def _load_teacher(self, genomes: Mapping[str, Genome]) -> AnyTeacher | None:
        """Returns a teacher as deep as any of the genomes needs, with a cache as deep as any could need; None when none
        of them learns."""
        wanted = [genome.plan.losses.wanted_teacher for genome in genomes.values() if genome.plan is not None]
        if not wanted:
            return None
        if self.config.proxy.teacher_cache is None:
            return load_teacher(self.plan.base, functools.reduce(operator.or_, wanted), self.runtime.device)
        return open_cached_teacher(self.config, self.plan.base, self.runtime, say=self.results.say)

    def _divide(self, genomes: Sequence[Genome], seed: int) -> list[Start]:
        """Returns the genomes that are trained side by side, group by group. Collective."""
        if not genomes:
            return []
        return [Start(genomes)] if self._checkpoints is None else self._checkpoints.divide(genomes, seed)

    def _run_cohort(self, start: Start, seed: int, teacher: AnyTeacher | None, evaluator: Evaluator) -> bool:
        """Distils the genomes side by side, scores and records each; returns False when told to stop. Collective."""
        with self.clock.phase("load"):
            cohort = self._open_cohort(start, seed, teacher, evaluator)
            if start.step:
                self.results.say(f"{', '.join(start.chosen)}, seed {seed}: continued after step {start.step}")
            if self._layer_tables is not None:
                self._layer_tables.begin(cohort)
            members = cohort.build_members()
        score = functools.partial(self._score, evaluator)
        try:
            if not self._train(cohort, members, score):
                return False
            if self._layer_tables is not None:
                self._layer_tables.introduce(self.results.say)
            with self._watch_scoring(seed):
                for member in members:
                    self._finish(member, score, len(members))
            return True
        except Stopped:
            return False
        finally:
            for member in members:
                member.release()
            members.clear()
            gc.collect()  # engines hold themselves in cycles of hooks

    def _open_cohort(self, start: Start, seed: int, teacher: AnyTeacher | None, evaluator: Evaluator) -> Cohort:
        base = replace(self.plan.base, config=replace(self.plan.base.config, seed=seed))
        loader = open_corpus(base, self._shard_check)
        self._shard_check = loader.check
        tokens = None
        if self._checkpoints is None and evaluator.tokens is not None:
            tokens = tokens_met(base, loader, evaluator.tokens)
        if isinstance(teacher, CachedTeacher):
            steps = range(start.step, self.config.proxy.steps)
            batches = (micro for step in steps for micro in loader.step(step).micro)
            teacher.expect(batches, ranks=self.runtime.world_size)
        return Cohort(
            base, start, teacher, loader, tokens, self.runtime, self.run_dir, self._checkpoints, self._on_record
        )

    def _train(self, cohort: Cohort, members: Sequence[Member], score: Callable[[Member], Scores]) -> bool:
        """Trains the members that learn; returns False when told to stop. Collective."""
        trainees = [member.trainee for member in members if member.trainee is not None]
        if not trainees:
            return True
        config, proxy = cohort.base.config, self.config.proxy
        trainer = Trainer(
            train=config.train,
            seed=config.seed,
            runtime=self.runtime,
            stop=self.stop,
            trainees=trainees,
            teacher=cohort.teacher,
            loader=cohort.loader,
            evaluation=IntermediateScores(
                members,
                frozenset(proxy.report_at),
                proxy.stop_below,
                score,
                None if self._checkpoints is None else self._checkpoints.keep_step,
            ),
            step=cohort.start.step,
        )
        with self.clock.phase("train"):
            return trainer.run() is not Outcome.PREEMPTED

    def _watch_scoring(self, seed: int) -> AbstractContextManager[None]:
        """Ends a rank that hangs inside as one that hangs in training."""
        steps, limit_s = self.config.proxy.steps, self.plan.base.config.train.hang_timeout_s
        monitor = Monitor.silent(self.run_dir, steps=steps, device=self.runtime.device)
        return monitor.watch_hangs(f"scores-seed{seed}", step=lambda: steps, rank=self.runtime.rank, limit_s=limit_s)

    def _score(self, evaluator: Evaluator, member: Member) -> Scores:
        """Returns the scores of a student. Collective."""
        start = time.perf_counter()
        member.evaluating(True)
        with self.clock.phase("evaluate"):
            scores = evaluator(member)
        scores = replace(scores, fitness=fitness_of(scores.tasks, self.results.yardstick))
        member.evaluating(False)
        member.evaluate_s += time.perf_counter() - start
        return scores

    def _finish(self, member: Member, score: Callable[[Member], Scores], cohort_size: int) -> None:
        """Scores a member and records its result; one that has diverged has its own record already. Collective."""
        key, seed, trainee, steps = member.genome.key, member.seed, member.trainee, self.config.proxy.steps
        if trainee is not None and (trainee.diverged or not trainee.check_weights(steps)):
            self.results.add_diverged(key, seed)
            return
        if member.stopped_at is not None:
            reports = {step: report.fitness for step, report in member.reports.items()}
            self.results.add_stopped(key, seed, member.stopped_at, reports)
            return
        scores = score(member)
        wall = {**self.clock.of_cohort(), "evaluate": member.evaluate_s}
        result: Result = {
            "status": "ok",
            **member.as_record(scores),
            "yardstick": {task: asdict(scale) for task, scale in self.results.yardstick.items()},
            "fingerprint": self.plan.fingerprint,
            "cohort": cohort_size,
            "peak_memory_gib": peak_memory_gib(self.runtime.device),
            **self.plan.base.execution.facts,
        }
        if trainee is not None:
            trainee.monitor.scores(steps, scores.tasks, aloud=False, metrics=scores.metrics, fitness=scores.fitness)
            wall |= trainee.monitor.history.seconds_by_phase
        if self.config.proxy.keep_students:
            folder = self.results.student_folder(member.genome, seed)
            watchdog.beat()
            member.save(folder)
            watchdog.beat()
            result["student"] = str(folder)
        if self._layer_tables is not None:
            start = time.perf_counter()
            with self.clock.phase("layers"):
                result["layers"] = self._layer_tables.measure(member)
            watchdog.beat()
            wall["layers"] = time.perf_counter() - start
        self.results.add({**result, "wall_s": wall})
        if self._checkpoints is not None and trainee is not None and trainee.checkpointer is not None:
            self._checkpoints.finish(trainee.checkpointer)
        if self._layer_tables is not None and result["layers"]:
            self.results.say(f"\n{self._layer_tables.text_of(member, result['layers'])}\n")
