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
import torch

from engine.config.proxy import ProxyJobConfig
from engine.data.loader import CorpusLoader
from engine.data.shard_check import ShardCheck
from engine.errors import EXIT_DONE, EXIT_PREEMPTED
from engine.jobs.distill.build import load_teacher, open_corpus
from engine.jobs.distill.plan import Plan
from engine.jobs.proxy.baselines import baselines
from engine.jobs.proxy.clock import PhaseClock
from engine.jobs.proxy.cohort import IntermediateScores, Member, build_member
from engine.jobs.proxy.evaluators import Evaluator, Scores, Stopped, build_evaluator
from engine.jobs.proxy.layer_table import LayerTables
from engine.jobs.proxy.plan import Genome, ProxyPlan, make_proxy_plan
from engine.jobs.proxy.report import Result, describe_start
from engine.jobs.proxy.results import Results, listed
from engine.jobs.proxy.teacher_cache import AnyTeacher, CachedTeacher, open_cached_teacher
from engine.losses.measure import TeacherSlice, sequences_of
from engine.ranks import run_lock, runtime, watchdog
from engine.ranks.agreement import require_agreement
from engine.ranks.collectives import gathered
from engine.records.fingerprints import flatten
from engine.records.run_dir import RunDir
from engine.records.yardstick import equal_scales, fitness_of
from engine.train.monitor import Monitor, peak_memory_gib
from engine.train.portable import copy_files
from engine.train.trainer import Outcome, Trainer


def proxy(config: ProxyJobConfig) -> int:
    """Runs the genomes that have no result yet; returns the exit code: 0 when any genome has one, 3 when all diverged,
    4 when told to stop (finished results are recorded, and the same command runs the others)."""
    began = psutil.Process().create_time()  # starting Python and importing are part of what a proxy costs
    plan = make_proxy_plan(config)
    run_dir = RunDir(Path(config.output_dir))
    writes = runtime.launcher_rank() == 0 and not config.dry_run
    with run_lock.held(run_dir.root, wanted=writes):
        if writes:
            run_dir.write_settings(
                config,
                ds_config=plan.base.execution.resolved,
                tokenizer=plan.base.tokenizer,
                beside_tokenizer=functools.partial(copy_files, plan.base.beside_tokenizer),
            )
        here = runtime.start(config.seed)
        require_agreement({**flatten(plan.fingerprint_parts), **plan.base.execution.facts})
        code = ProxyJob(plan, run_dir, here, began).run()
        torch.distributed.destroy_process_group()
        return code


class ProxyJob:
    """One start on this rank."""

    def __init__(self, plan: ProxyPlan, run_dir: RunDir, here: runtime.Runtime, began: float) -> None:
        """Reads the results of earlier starts. Collective. began: when the process started."""
        self.plan, self.run_dir, self.here = plan, run_dir, here
        self.config = plan.config
        self.results = Results(plan, run_dir, here)
        self.clock = PhaseClock(time.time() - began)
        self.stop = runtime.StopRequest()
        self._shard_check: ShardCheck | None = None
        """All cohorts read one corpus."""
        self._layer_tables = LayerTables(here) if self.config.proxy.layer_table else None

    def run(self) -> int:
        """Returns the exit code."""
        results = self.results
        results.say(describe_start(self.plan, self.here, results.seeds, set(results.found)))
        if self.config.dry_run:
            results.say_record("run", status="planned", **results.facts, **self.plan.facts)
            return EXIT_DONE
        results.open()
        try:
            results.take_yardstick()
            results.record("run", status="started", fingerprint_parts=self.plan.fingerprint_parts)
            if any(results.missing.values()) and not self._run_missing(results.missing):
                results.record("run", status="preempted", signal=self.stop.signal)
                return EXIT_PREEMPTED
            return results.finish(self.clock.seconds)
        finally:
            results.close()

    def _run_missing(self, missing: Mapping[int, Sequence[Genome]]) -> bool:
        """Returns whether it came to an end: False when told to stop. missing: genomes by seed."""
        with self.clock.phase("encode"):
            scratch = self.run_dir.root / "students" / ".scored"
            evaluator = build_evaluator(self.plan, self.here, self.stop, scratch)
        if not self.results.yardstick and not self._measure_yardstick(evaluator):
            return False
        with self.clock.phase("load"):
            teacher = self._teacher({genome.key: genome for group in missing.values() for genome in group})
        self.clock.share()
        for seed, genomes in missing.items():
            self.clock.begin_cohort()
            if genomes and not self._cohort(genomes, seed, teacher, evaluator):
                return False
        if isinstance(teacher, CachedTeacher):
            teacher.close()
        return True

    def _measure_yardstick(self, evaluator: Evaluator) -> bool:
        """Scores the baselines; returns False when told to stop. Collective."""
        found: dict[str, Scores] = {}
        try:
            with self.clock.phase("baselines"), self._scoring_watched(self.config.seed):
                for name, model in baselines(self.plan.base, self.here.device):
                    found[name] = evaluator(model)
        except Stopped:
            return False
        self.results.yardstick = equal_scales(found["start"].tasks, found["teacher"].tasks, self.plan.counted)
        self.results.record("run", status="baselines", **{name: scores.tasks for name, scores in found.items()})
        for name, scores in found.items():
            self.results.say(f"{name}  ({listed(scores.tasks)})")
        return True

    def _teacher(self, genomes: Mapping[str, Genome]) -> AnyTeacher | None:
        """Returns a teacher as deep as any of the genomes needs, with a cache as deep as any could need; None when none
        of them learns."""
        wanted = [genome.plan.losses.wanted_teacher for genome in genomes.values() if genome.plan is not None]
        if not wanted:
            return None
        if self.config.proxy.teacher_cache is None:
            return load_teacher(self.plan.base, functools.reduce(operator.or_, wanted), self.here.device)
        return open_cached_teacher(self.config, self.plan.base, self.here, say=self.results.say)

    def _cohort(self, genomes: Sequence[Genome], seed: int, teacher: AnyTeacher | None, evaluator: Evaluator) -> bool:
        """Distils the genomes side by side, scores and records each; returns False when told to stop."""
        base = replace(self.plan.base, config=replace(self.plan.base.config, seed=seed))
        with self.clock.phase("load"):
            loader = open_corpus(base, self._shard_check)
            self._shard_check = loader.check
            tokens = self._tokens(loader, evaluator)
            if isinstance(teacher, CachedTeacher):
                batches = (micro for step in range(self.config.proxy.steps) for micro in loader.step(step).micro)
                teacher.expect(batches, ranks=self.here.world_size)
            learning = [genome.plan for genome in genomes if genome.plan is not None]
            on = None
            if teacher is not None and any(plan.losses.looks_at_slice for plan in learning):
                on = TeacherSlice(loader.first_batches(self._slice), teacher, self.here.device, base.teacher_shape)
            if self._layer_tables is not None:
                self._layer_tables.begin(base, genomes, loader)
            members = [
                build_member(
                    genome,
                    base,
                    seed,
                    teacher=teacher,
                    cohort=len(genomes),
                    tokens=tokens,
                    on=on,
                    sequence_ids=loader.sequence_ids,
                    here=self.here,
                    run_dir=self.run_dir,
                )
                for genome in genomes
            ]
        score = functools.partial(self._score, evaluator)
        try:
            if not self._train(members, base, seed, teacher, loader, score):
                return False
            if self._layer_tables is not None:
                self._layer_tables.introduce(self.results.say)
            with self._scoring_watched(seed):
                for member in members:
                    self._finish(member, seed, score, len(members))
            return True
        except Stopped:
            return False
        finally:
            for member in members:
                member.release()
            members.clear()
            gc.collect()  # engines hold themselves in cycles of hooks

    @property
    def _slice(self) -> int:
        """Number of sequences that the losses are measured on."""
        return sequences_of(self.config.loss, self.plan.base.seq_len)

    def _tokens(self, loader: CorpusLoader, evaluator: Evaluator) -> torch.Tensor:
        """Returns the ids that a student of this cohort will meet, each once: in its batches and in its texts.
        Collective."""
        met = [evaluator.tokens]
        met += [batch.input_ids.flatten() for batch in loader.first_batches(self._slice)]
        for step in range(self.config.proxy.steps):
            met += [micro.input_ids.flatten() for micro in loader.step(step).micro]
        tokens = torch.unique(torch.cat(met))
        return torch.unique(torch.cat(gathered(tokens)))

    def _train(
        self,
        members: Sequence[Member],
        base: Plan,
        seed: int,
        teacher: AnyTeacher | None,
        loader: CorpusLoader,
        score: Callable[[Member], Scores],
    ) -> bool:
        """Returns False when told to stop."""
        trainees = [member.trainee for member in members if member.trainee is not None]
        if not trainees:
            return True
        trainer = Trainer(
            train=base.config.train,
            seed=seed,
            execution=base.execution,
            runtime=self.here,
            stop=self.stop,
            trainees=trainees,
            teacher=teacher,
            loader=loader,
            evaluation=IntermediateScores(
                members, frozenset(self.config.proxy.report_at), self.config.proxy.stop_below, score
            ),
        )
        with self.clock.phase("train"):
            return trainer.run() is not Outcome.PREEMPTED

    def _scoring_watched(self, seed: int) -> AbstractContextManager[None]:
        """A rank that hangs inside ends as one that hangs in training does."""
        steps, limit_s = self.config.proxy.steps, self.plan.base.config.train.hang_timeout_s
        monitor = Monitor.silent(self.run_dir, steps=steps, device=self.here.device)
        return monitor.hangs_watched(f"scores-seed{seed}", step=lambda: steps, rank=self.here.rank, limit_s=limit_s)

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

    def _finish(self, member: Member, seed: int, score: Callable[[Member], Scores], cohort: int) -> None:
        """Scores a member and records its result; one that has diverged has its own record already."""
        genome, trainee, steps = member.genome, member.trainee, self.config.proxy.steps
        if trainee is not None and (trainee.diverged or not trainee.check_weights(steps)):
            self.results.diverged(genome.key, seed)
            return
        reports = {step: report.fitness for step, report in member.reports.items()}
        if member.stopped_at is not None:
            self.results.stopped(genome.key, seed, member.stopped_at, reports)
            return
        scores = score(member)
        wall = {**self.clock.of_cohort(), "evaluate": member.evaluate_s}
        result: Result = {
            "status": "ok",
            "genome": genome.key,
            "seed": seed,
            "mapping": {"hidden": str(genome.mapping.hidden), "attention": str(genome.mapping.attention)},
            "scores": scores.tasks,
            "metrics": scores.metrics,
            "fitness": scores.fitness,
            "yardstick": {task: asdict(scale) for task, scale in self.results.yardstick.items()},
            "reports": {str(step): fitness for step, fitness in reports.items()},
            "fingerprint": self.plan.fingerprint,
            "steps": 0 if trainee is None else steps,
            "cohort": cohort,
            "peak_memory_gib": peak_memory_gib(self.here.device),
            **self.plan.base.execution.facts,
        }
        if trainee is not None:
            trainee.monitor.scores(steps, scores.tasks, aloud=False, metrics=scores.metrics, fitness=scores.fitness)
            history = trainee.monitor.history
            if history.steps:  # on rank 0
                result |= {"losses": history.last["losses"], "total": history.last["total"]}
                result["tokens_per_s"] = history.tokens_per_s
                wall |= history.seconds_by_phase
        if self.config.proxy.keep_students:
            folder = self.results.student_folder(genome, seed)
            watchdog.beat()
            member.save(folder)
            watchdog.beat()
            result["student"] = str(folder)
        if self._layer_tables is not None:
            start = time.perf_counter()
            with self.clock.phase("layers"):
                result["layers"] = self._layer_tables.of(member)
            watchdog.beat()
            wall["layers"] = time.perf_counter() - start
        self.results.add({**result, "wall_s": wall})
        if self._layer_tables is not None and result["layers"]:
            self.results.say(f"\n{self._layer_tables.text_of(member, result['layers'])}\n")
