"""The results of a proxy job: its own, those of earlier starts, and the records of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.jobs.proxy.plan import Genome, ProxyPlan
from engine.jobs.proxy.report import Result, closing_text, earlier_results, signal_of
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime
from engine.records.records import OnRecord, RecordWriter, format_record
from engine.records.run_dir import RunDir
from engine.records.yardstick import TaskScale, Yardstick, fitness_of
from engine.train.monitor import open_records
from engine.train.trainer import Outcome


class Results:
    """The results of one proxy job, in memory, on the screen and in records.jsonl; rank 0 shows and writes them."""

    def __init__(self, plan: ProxyPlan, run_dir: RunDir, runtime: Runtime, on_record: OnRecord | None = None) -> None:
        """Reads the results of earlier starts. Collective. on_record: is called with each record."""
        self.plan, self.run_dir = plan, run_dir
        self._on_record = on_record
        self.genomes = {genome.key: genome for genome in plan.genomes}
        self.seeds = range(plan.config.seed, plan.config.seed + plan.config.proxy.repeats)
        self.failed: list[str] = []
        """Lines about genomes without a result, with the reason."""
        self.yardstick: Yardstick = plan.config.proxy.yardstick
        """Scale of the fitness; empty before the baselines are scored."""
        self._any_stopped = False
        self._shows = runtime.is_rank_zero
        self._writer: RecordWriter | None = None
        self.known: dict[tuple[str, int], Result] = from_rank_zero(self._earlier)  # the file may be on its host alone
        """Results by genome and seed."""

    def _earlier(self) -> dict[tuple[str, int], Result]:
        """Returns what need not be computed again, by genome and seed."""
        if self.plan.config.resume != "auto":
            return {}
        earlier = earlier_results(self.run_dir.records, self.plan.fingerprint)
        return {pair: result for pair, result in earlier.items() if not self._lacks(pair, result)}

    def _lacks(self, pair: tuple[str, int], result: Result) -> bool:
        """Returns whether something is wanted now that an earlier start has not left: a score, the student, or its
        layer table."""
        proxy = self.plan.config.proxy
        if any(task not in result["scores"] for task in self.plan.scored):
            return True
        key, seed = pair
        if key not in self.genomes or seed not in self.seeds:
            return False
        if proxy.layer_table and "layers" not in result:
            return True
        kept = "student" in result and self.student_folder(self.genomes[key], seed).is_dir()
        return proxy.keep_students and not kept

    def student_folder(self, genome: Genome, seed: int) -> Path:
        """Returns the folder of a student that is kept."""
        return self.run_dir.root / "students" / f"{genome.mapping.file_name}-seed{seed}"

    @property
    def missing(self) -> dict[int, list[Genome]]:
        """Genomes without a result, by seed"""
        return {
            seed: [genome for genome in self.plan.genomes if (genome.key, seed) not in self.known]
            for seed in self.seeds
        }

    def open(self) -> None:
        """Begins to write records."""
        self._writer = open_records(self.run_dir.records, echo=True, on_record=self._on_record) if self._shows else None

    def close(self) -> None:
        """Closes records.jsonl. Raises RunFailure when a result could not be recorded."""
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._shows:
            print(text, flush=True)

    def record(self, kind: str, **fields: Any) -> None:
        """Writes a record about the whole job."""
        if self._writer is not None:
            self._writer.write(kind, **self.facts, **fields)

    def say_record(self, kind: str, **fields: Any) -> None:
        """Prints a record that no file gets, unless on a terminal or for a program that gets them itself."""
        if self._shows and self._on_record is None and not sys.stdout.isatty():
            print(format_record(kind, **fields), flush=True)

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of every record about the whole job"""
        facts = {"genomes": list(self.genomes), "seeds": list(self.seeds), "fingerprint": self.plan.fingerprint}
        return facts | self.plan.base.execution.facts

    def take_yardstick(self) -> None:
        """Takes the yardstick of earlier results where none is given, and gives them the fitness by that of this
        start."""
        if self.known and not self.yardstick:
            self.say(f"the yardstick is that of the earlier results in {self.plan.config.output_dir}")
        for result in self.known.values():
            self.yardstick = self.yardstick or {
                task: TaskScale(**result["yardstick"][task]) for task in self.plan.counted
            }
            result["fitness"] = fitness_of(result["scores"], self.yardstick)

    def add(self, result: Result) -> None:
        """Records a result, and prints its scores."""
        self.known[result["genome"], result["seed"]] = result
        if self._writer is not None:
            self._writer.write("result", **result)
        named = f"{result['genome']}  seed {result['seed']}"
        self.say(f"{named}  fitness {result['fitness']:.4f}  ({listed(result['scores'])})")

    def add_diverged(self, genome: str, seed: int) -> None:
        """Notes a student that has diverged; records.jsonl has it from its monitor."""
        self.failed.append(f"{genome}  seed {seed}: diverged")
        self.say_record("error", status="diverged", genome=genome, seed=seed, fingerprint=self.plan.fingerprint)

    def add_stopped(self, genome: str, seed: int, step: int, reports: Mapping[int, float]) -> None:
        """Records a student that was stopped early. reports: fitness by step."""
        self._any_stopped = True
        self.failed.append(f"{genome}  seed {seed}: stopped after step {step}, fitness {reports[step]:.4f}")
        if self._writer is not None:
            self._writer.write(
                "step",
                status="stopped",
                step=step,
                genome=genome,
                seed=seed,
                fitness=reports[step],
                reports={str(at): fitness for at, fitness in reports.items()},
                fingerprint=self.plan.fingerprint,
            )

    def finish(self, wall_s: Mapping[str, float]) -> Outcome:
        """Records the end and prints the table; returns how the job ended. wall_s: seconds by phase."""
        results = list(self.known.values())
        signal = signal_of(results)
        self.record("run", status="finished", signal=None if signal is None else asdict(signal), wall_s=dict(wall_s))
        given = {key: genome.given for key, genome in self.genomes.items()}
        self.say("\n" + closing_text(results, given, self.failed, self.yardstick, tasks=self.plan.scored))
        asked = [genome.key for genome in self.plan.genomes if genome.asked]
        done = self._any_stopped or any((key, seed) in self.known for key in asked for seed in self.seeds)
        return Outcome.DONE if done else Outcome.DIVERGED


def listed(scores: Mapping[str, float]) -> str:
    """Returns "SST-2 0.8012, MRPC 0.7402"."""
    return ", ".join(f"{task} {value:.4f}" for task, value in scores.items())
