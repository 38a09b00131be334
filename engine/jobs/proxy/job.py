"""The proxy job: short distillations of several genomes side by side, each student scored on tasks.

One teacher forward serves every student of the cohort; each has its own optimizer, clipping and loss scaler, and the
same numbers as if it were alone.
"""

from __future__ import annotations

import functools
import gc
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.config.proxy import ProxyJobConfig
from engine.data.loader import CorpusLoader
from engine.data.shard_check import ShardCheck
from engine.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_PREEMPTED
from engine.jobs.distill.build import load_teacher, open_corpus
from engine.jobs.distill.plan import Plan
from engine.jobs.proxy.baselines import baselines
from engine.jobs.proxy.cohort import IntermediateScores, Member, build_member
from engine.jobs.proxy.evaluators import Evaluator, Scores, Stopped, build_evaluator
from engine.jobs.proxy.layer_table import LayerTables
from engine.jobs.proxy.plan import Genome, ProxyPlan, make_proxy_plan
from engine.jobs.proxy.report import Result, closing_text, describe_start, earlier_results, signal_of
from engine.jobs.proxy.teacher_cache import AnyTeacher, CachedTeacher, open_cached_teacher
from engine.losses.measure import TeacherSlice, sequences_of
from engine.ranks import run_lock, runtime, watchdog
from engine.ranks.agreement import require_agreement
from engine.ranks.collectives import from_rank_zero, gathered
from engine.records.fingerprints import flatten
from engine.records.records import RecordWriter, format_record
from engine.records.run_dir import RunDir
from engine.records.yardstick import TaskScale, Yardstick, alike, fitness_of
from engine.train.monitor import Monitor, open_records, peak_memory_gib
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
        self.plan, self.run_dir, self.here, self.began = plan, run_dir, here, began
        self.config = plan.config
        self.seeds = range(self.config.seed, self.config.seed + self.config.proxy.repeats)
        self.genomes = {genome.key: genome for genome in plan.genomes}
        self.stop = runtime.StopRequest()
        self.wall: dict[str, float] = {}
        """Seconds by phase, over all cohorts of this start; a second counts for one phase."""
        self._inner_s = 0.0
        """Of the phases inside the current one."""
        self.failed: list[str] = []
        """Genomes without a result, with the reason."""
        self.stopped = False
        """Whether one of them was stopped early."""
        self.results: dict[tuple[str, int], Result] = {}
        """By genome and seed; with those of earlier starts that can be compared."""
        self.yardstick: Yardstick = self.config.proxy.yardstick
        """Empty before the baselines are scored."""
        self._earlier_cohorts: dict[str, float] = {}
        """Seconds by phase of the cohorts of this start that are done; without what all cohorts share."""
        self._shard_check: ShardCheck | None = None
        """All cohorts read one corpus."""
        self._layer_tables = LayerTables(here) if self.config.proxy.layer_table else None
        self._records: RecordWriter | None = None

    def run(self) -> int:
        self.results = self._earlier_results()
        if self.here.is_rank_zero:
            print(describe_start(self.plan, self.here, self.seeds, set(self.results)), flush=True)
        if self.config.dry_run:
            self._say_record("run", status="planned", **self._facts, **self.plan.facts)
            return EXIT_DONE
        self.wall["start"] = time.time() - self.began
        self._records = open_records(self.run_dir.records) if self.here.is_rank_zero else None
        try:
            return self._run()
        finally:
            if self._records is not None:
                self._records.close()

    def _earlier_results(self) -> dict[tuple[str, int], Result]:
        """Read by rank 0 and told to all: the file may be on its host alone."""

        def read() -> dict[tuple[str, int], Result]:
            if self.config.resume != "auto":
                return {}
            found = earlier_results(self.run_dir.records, self.plan.fingerprint)
            return {pair: result for pair, result in found.items() if not self._lacks(pair, result)}

        return from_rank_zero(read)

    def _lacks(self, pair: tuple[str, int], result: Result) -> bool:
        """Whether something is wanted now that an earlier start has not left: a score, the student, or its layer
        table."""
        if any(task.spec.name not in result["scores"] for task in self.plan.tasks):
            return True
        key, seed = pair
        if key not in self.genomes or seed not in self.seeds:
            return False
        if self._layer_tables is not None and "layers" not in result:
            return True
        kept = "student" in result and self._student_folder(self.genomes[key], seed).is_dir()
        return self.config.proxy.keep_students and not kept

    def _student_folder(self, genome: Genome, seed: int) -> Path:
        return self.run_dir.root / "students" / f"{genome.mapping.file_name}-seed{seed}"

    def _run(self) -> int:
        self._take_yardstick()
        self._record("run", status="started", fingerprint_parts=self.plan.fingerprint_parts)
        missing = {
            seed: [genome for genome in self.plan.genomes if (genome.key, seed) not in self.results]
            for seed in self.seeds
        }
        if any(missing.values()):
            with self._phase("encode"):
                evaluator = self._build_evaluator()
            if not self.yardstick and not self._measure_yardstick(evaluator):
                self._record("run", status="preempted", signal=self.stop.signal)
                return EXIT_PREEMPTED
            with self._phase("load"):
                teacher = self._teacher({genome.key: genome for group in missing.values() for genome in group})
            shared = dict(self.wall)
            for seed, genomes in missing.items():
                self._earlier_cohorts = {name: seconds - shared.get(name, 0.0) for name, seconds in self.wall.items()}
                if genomes and not self._cohort(genomes, seed, teacher, evaluator):
                    self._record("run", status="preempted", signal=self.stop.signal)
                    return EXIT_PREEMPTED
            if isinstance(teacher, CachedTeacher):
                teacher.close()
        signal = signal_of(list(self.results.values()))
        self._record("run", status="finished", signal=None if signal is None else asdict(signal), wall_s=self.wall)
        if self.here.is_rank_zero:
            given = {key: genome.given for key, genome in self.genomes.items()}
            tasks = [task.spec.name for task in self.plan.tasks]
            text = closing_text(list(self.results.values()), given, self.failed, self.yardstick, tasks=tasks)
            print("\n" + text, flush=True)
        asked = [genome.key for genome in self.plan.genomes if genome.asked]
        done = self.stopped or any((key, seed) in self.results for key in asked for seed in self.seeds)
        return EXIT_DONE if done else EXIT_DIVERGED

    @property
    def _facts(self) -> dict[str, Any]:
        facts = {"genomes": list(self.genomes), "seeds": list(self.seeds), "fingerprint": self.plan.fingerprint}
        return facts | self.plan.base.execution.facts

    def _record(self, kind: str, **fields: Any) -> None:
        if self._records is not None:
            self._records.write(kind, **self._facts, **fields)

    def _say_record(self, kind: str, **fields: Any) -> None:
        """To stdout only, and not on a terminal."""
        if self.here.is_rank_zero and not sys.stdout.isatty():
            print(format_record(kind, **fields), flush=True)

    def _stopped_early(self, member: Member, step: int) -> None:
        fitness = member.reports[step].fitness
        self.stopped = True
        self.failed.append(f"{member.genome.key}  seed {member.seed}: stopped after step {step}, fitness {fitness:.4f}")
        if self._records is not None:
            self._records.write(
                "step",
                status="stopped",
                step=step,
                genome=member.genome.key,
                seed=member.seed,
                fitness=fitness,
                reports={str(at): report.fitness for at, report in member.reports.items()},
                fingerprint=self.plan.fingerprint,
            )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start, before, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        yield
        seconds = time.perf_counter() - start
        self.wall[name] = self.wall.get(name, 0.0) + seconds - self._inner_s
        self._inner_s = before + seconds

    def _build_evaluator(self) -> Evaluator:
        scratch = self.run_dir.root / "students" / ".scored"
        return build_evaluator(self.plan, self.here, self.stop, scratch)

    def _take_yardstick(self) -> None:
        """From earlier results, where there are any; their fitness is then by the yardstick of this start."""
        if self.results and not self.yardstick:
            self._say(f"the yardstick is that of the earlier results in {self.config.output_dir}")
        for result in self.results.values():
            self.yardstick = self.yardstick or {
                task: TaskScale(**result["yardstick"][task]) for task in self.plan.counted
            }
            result["fitness"] = fitness_of(result["scores"], self.yardstick)

    def _measure_yardstick(self, evaluator: Evaluator) -> bool:
        """Collective. Scores the baselines. False when told to stop."""
        found: dict[str, Scores] = {}
        try:
            with self._phase("baselines"), self._scoring_watched(self.config.seed):
                for name, model in baselines(self.plan.base, self.here.device):
                    found[name] = evaluator(model)
        except Stopped:
            return False
        self.yardstick = alike(found["start"].tasks, found["teacher"].tasks, self.plan.counted)
        self._record("run", status="baselines", **{name: scores.tasks for name, scores in found.items()})
        for name, scores in found.items():
            self._say(f"{name}  ({_listed(scores.tasks)})")
        return True

    def _teacher(self, genomes: Mapping[str, Genome]) -> AnyTeacher | None:
        """As deep as the deepest layer that any of the genomes needs; with a cache, as deep as any could need. None
        when none of them learns."""
        wanted = [genome.plan.losses.wanted_teacher for genome in genomes.values() if genome.plan is not None]
        if not wanted:
            return None
        if self.config.proxy.teacher_cache is None:
            return load_teacher(self.plan.base, functools.reduce(operator.or_, wanted), self.here.device)
        return open_cached_teacher(self.config, self.plan.base, self.here, say=self._say)

    def _say(self, text: str) -> None:
        if self.here.is_rank_zero:
            print(text, flush=True)

    def _cohort(self, genomes: Sequence[Genome], seed: int, teacher: AnyTeacher | None, evaluator: Evaluator) -> bool:
        """Distils the genomes side by side, scores and records each. False when told to stop."""
        base = replace(self.plan.base, config=replace(self.plan.base.config, seed=seed))
        with self._phase("load"):
            loader = open_corpus(base, self._shard_check)
            self._shard_check = loader.check
            tokens = self._tokens(loader, evaluator)
            if isinstance(teacher, CachedTeacher):
                batches = (micro for step in range(self.config.proxy.steps) for micro in loader.step(step).micro)
                teacher.expect(batches, ranks=self.here.world_size)
            learning = [genome.plan for genome in genomes if genome.plan is not None]
            on = None
            if teacher is not None and any(plan.losses.looks_at_slice for plan in learning):
                on = TeacherSlice(loader.first(self._slice), teacher, self.here.device, base.teacher_shape)
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
                self._layer_tables.introduce(self._say)
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
        """Sequences that the losses are measured on."""
        return sequences_of(self.config.loss, self.plan.base.seq_len)

    def _tokens(self, loader: CorpusLoader, evaluator: Evaluator) -> torch.Tensor:
        """Collective. The ids that a student of this cohort will meet, each once: in its batches and in its texts."""
        met = [evaluator.tokens]
        met += [batch.input_ids.flatten() for batch in loader.first(self._slice)]
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
        """False when told to stop."""
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
        with self._phase("train"):
            return trainer.run() is not Outcome.PREEMPTED

    def _scoring_watched(self, seed: int) -> AbstractContextManager[None]:
        """A rank that hangs inside ends as one that hangs in training does."""
        steps, limit_s = self.config.proxy.steps, self.plan.base.config.train.hang_timeout_s
        monitor = Monitor.silent(self.run_dir, steps=steps, device=self.here.device)
        return monitor.hangs_watched(f"scores-seed{seed}", step=lambda: steps, rank=self.here.rank, limit_s=limit_s)

    def _score(self, evaluator: Evaluator, member: Member) -> Scores:
        """Collective."""
        start = time.perf_counter()
        member.evaluating(True)
        with self._phase("evaluate"):
            scores = evaluator(member)
        scores = replace(scores, fitness=fitness_of(scores.tasks, self.yardstick))
        member.evaluating(False)
        member.evaluate_s += time.perf_counter() - start
        return scores

    def _finish(self, member: Member, seed: int, score: Callable[[Member], Scores], cohort: int) -> None:
        """Scores a member and records its result; one that has diverged has its own record already."""
        genome, trainee, steps = member.genome, member.trainee, self.config.proxy.steps
        if trainee is not None and (trainee.diverged or not trainee.check_weights(steps)):
            self.failed.append(f"{genome.key}  seed {seed}: diverged")
            self._say_record(  # records.jsonl has it from the member's monitor
                "error", status="diverged", genome=genome.key, seed=seed, fingerprint=self.plan.fingerprint
            )
            return
        if member.stopped_at is not None:
            self._stopped_early(member, member.stopped_at)
            return
        scores = score(member)
        result: Result = {
            "status": "ok",
            "genome": genome.key,
            "seed": seed,
            "mapping": {"hidden": str(genome.mapping.hidden), "attention": str(genome.mapping.attention)},
            "scores": scores.tasks,
            "metrics": scores.metrics,
            "fitness": scores.fitness,
            "yardstick": {task: asdict(scale) for task, scale in self.yardstick.items()},
            "reports": {str(step): report.fitness for step, report in member.reports.items()},
            "fingerprint": self.plan.fingerprint,
            "steps": 0 if trainee is None else steps,
            "cohort": cohort,
            "peak_memory_gib": peak_memory_gib(self.here.device),
            **self.plan.base.execution.facts,
        }
        wall = {name: seconds - self._earlier_cohorts.get(name, 0.0) for name, seconds in self.wall.items()}
        wall["evaluate"] = member.evaluate_s
        if trainee is not None:
            trainee.monitor.scores(steps, scores.tasks, aloud=False, metrics=scores.metrics, fitness=scores.fitness)
            history = trainee.monitor.history
            if history.steps:  # on rank 0
                result |= {"losses": history.last["losses"], "total": history.last["total"]}
                result["tokens_per_s"] = history.tokens_per_s
                wall |= history.seconds_by_phase
        if self.config.proxy.keep_students:
            folder = self._student_folder(genome, seed)
            watchdog.beat()
            member.save(folder)
            watchdog.beat()
            result["student"] = str(folder)
        if self._layer_tables is not None:
            start = time.perf_counter()
            with self._phase("layers"):
                result["layers"] = self._layer_tables.of(member)
            watchdog.beat()
            wall["layers"] = time.perf_counter() - start
        result["wall_s"] = wall
        self.results[genome.key, seed] = result
        if self._records is not None:
            self._records.write("result", **result)
            print(f"{genome.key}  seed {seed}  fitness {scores.fitness:.4f}  ({_listed(scores.tasks)})", flush=True)
            if self._layer_tables is not None and result["layers"]:
                print(f"\n{self._layer_tables.text_of(member, result['layers'])}\n", flush=True)


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {value:.4f}" for task, value in scores.items())
