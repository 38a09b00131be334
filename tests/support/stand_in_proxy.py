"""A proxy job that trains nothing: writes the records that launch/proxy.py would write (a test of
tests/distributed/test_search.py holds it to that), with scores that genome, seed and step alone decide.

It takes the launcher's place, and is given its command line. STAND_IN in the environment, a JSON object, says what goes
otherwise than well:
    seconds: that each result takes
    fits: most genomes of a job that fit into memory
    refuses: what is wrong with the configuration
    genomes: {genome: "diverges" or "crashes"}
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, get_args, get_type_hints

import yaml

from engine.config.distill import trained_pairs
from engine.config.marks import Mark, settings
from engine.config.proxy import ProxyJobConfig
from engine.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_DIVERGED, EXIT_DONE
from engine.mapping import MappingPair
from engine.records.fingerprints import digest
from engine.records.records import RecordWriter
from engine.records.run_dir import RunDir
from engine.records.yardstick import TaskScale, fitness_of

METRICS = {
    "reviews": ("accuracy",),
    "SST-2": ("accuracy",),
    "MRPC": ("accuracy", "f1"),
    "STS-B": ("pearson", "spearman"),
    "RTE": ("accuracy",),
}
CODE = ("mapdistill", "torch", "deepspeed", "transformers", "torchmetrics")
EXECUTION = {"precision": "float32", "world_size": 1, "zero_stage": 0}
Fields = dict[str, Any]


def read_config(kind: Any, values: Fields) -> Any:
    """Makes a configuration of what its YAML holds; parse_config would take half of a job's time."""
    kinds = get_type_hints(kind)
    return kind(**{key: _value(kinds[key], value) for key, value in values.items()})


def _value(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        return read_config(kind, value)
    of = get_args(kind)[1:]  # of a dictionary's values
    return {key: read_config(of[0], one) for key, one in value.items()} if of and is_dataclass(of[0]) else value


class StandIn:
    def __init__(self, config: ProxyJobConfig, told: Fields) -> None:
        self.config, self.proxy, self.told = config, config.proxy, told
        self.teacher = json.loads((Path(str(config.teacher.path)) / "config.json").read_text(encoding="utf-8"))
        self.corpus = json.loads((Path(config.data.path) / "manifest.json").read_text(encoding="utf-8"))
        self.layers = {"student_layers": config.student.layers, "teacher_layers": self.teacher["num_hidden_layers"]}
        texts = [*config.genomes, *(() if config.proxy.yardstick else ("none",))]
        pairs = [MappingPair.parse(text, **self.layers, key="genomes") for text in texts]
        alike = {task: TaskScale(start=0.4, teacher=0.95) for task in config.proxy.tasks}
        self.yardstick = config.proxy.yardstick or alike
        self.genomes = {str(pair): pair for pair in pairs}
        self.seeds = list(range(config.seed, config.seed + self.proxy.repeats))
        self.parts = self._fingerprint_parts()
        self.facts = {
            "genomes": list(self.genomes),
            "seeds": self.seeds,
            "fingerprint": digest(self.parts),
            **EXECUTION,
        }

    def _fingerprint_parts(self) -> Fields:
        """As in engine/jobs/proxy/plan.py, without reading weights and rows."""
        parts: Fields = {}
        for key, value in settings(self.config, Mark.RESULT).items():
            section, _, name = key.partition(".")
            parts.setdefault(section, {})[name] = value
        for name in ("epochs", "lr", "batch"):  # of an evaluator that no test uses
            del parts["proxy"][name]
        hashes = {f"{what}_sha256": digest([what, self.teacher]) for what in ("config", "weights")}
        means = {"pooling": ["mean"], "dense": [], "lower_case": False, "prompts": {}, "default_prompt": None}
        parts["teacher"] |= hashes | {"dtype": "float32", "vectors": means}
        parts["data"] |= {"content_sha256": digest(self.corpus), "seq_len": self.corpus["seq_len"]}
        parts["train"]["precision"] = "float32"
        parts["tasks"] = {task: {"sha256": digest(task), "metrics": list(METRICS[task])} for task in self.proxy.tasks}
        return parts | {"code": dict.fromkeys(CODE, "0")}

    def run(self) -> int:
        if "refuses" in self.told:
            print(f"error: {self.told['refuses']}", file=sys.stderr)
            return EXIT_BAD_INPUT
        records = RunDir(Path(self.config.output_dir)).records
        self.aloud = RecordWriter(records, echo=True)
        self.silent = RecordWriter(records)  # what the students' monitors write
        self.aloud.write("run", status="started", fingerprint_parts=self.parts, **self.facts)
        if not self.proxy.yardstick:
            start = {task: one.start for task, one in self.yardstick.items()}
            teacher = {task: one.teacher for task, one in self.yardstick.items()}
            self.aloud.write("run", status="baselines", start=start, teacher=teacher, **self.facts)
        if len(self.genomes) > self.told.get("fits", len(self.genomes)):
            print("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
            return EXIT_CRASH
        for seed in self.seeds:
            self._cohort(seed)
        wall = dict.fromkeys(self._phases, 0.1)
        self.aloud.write("run", status="finished", signal=None, wall_s=wall, **self.facts)
        return EXIT_DIVERGED if all(self._is(genome, "diverges") for genome in self.genomes) else EXIT_DONE

    @property
    def _phases(self) -> list[str]:
        phases = ["start", "encode", "load", "train", "evaluate"]
        phases += [] if self.proxy.yardstick else ["baselines"]
        return [*phases, "layers"] if self.proxy.layer_table else phases

    def _is(self, genome: str, what: str) -> bool:
        return bool(self.told.get("genomes", {}).get(genome) == what)

    def _cohort(self, seed: int) -> None:
        last, every = self.proxy.steps, self.config.train.log_every
        reports: dict[str, dict[str, float]] = {genome: {} for genome in self.genomes}
        stopped: dict[str, int] = {}
        for step in sorted({*self.proxy.report_at, *range(every, last, every), last}):
            alive = [genome for genome in self.genomes if genome not in stopped and not self._is(genome, "diverges")]
            for genome in alive:
                self.silent.write("step", genome=genome, seed=seed, step=step, **self._progress(genome, step))
            for genome in alive if step in self.proxy.report_at else ():
                scores = self._scores(genome, seed, step)
                self.silent.write("step", genome=genome, seed=seed, step=step, **scores)
                reports[genome][str(step)] = scores["fitness"]
                if scores["fitness"] < self.proxy.stop_below.get(step, 0.0):
                    stopped[genome] = step
        for genome in self.genomes:
            self._finish(genome, seed, reports[genome], stopped.get(genome))

    def _finish(self, genome: str, seed: int, reports: dict[str, float], stopped: int | None) -> None:
        mine = {"genome": genome, "seed": seed, "fingerprint": self.facts["fingerprint"]}
        if self._is(genome, "diverges"):
            self.aloud.write("error", status="diverged", **mine)
            return
        if stopped is not None:
            at = {"step": stopped, "fitness": reports[str(stopped)]}
            self.aloud.write("step", status="stopped", reports=reports, **at, **mine)
            return
        time.sleep(self.told.get("seconds", 0.0))
        if self._is(genome, "crashes"):
            raise RuntimeError(f"told to crash at {genome}")
        steps, pair = self.proxy.steps, self.genomes[genome]
        progress, scores = self._progress(genome, steps), self._scores(genome, seed, steps)
        self.silent.write("step", genome=genome, seed=seed, step=steps, **scores)
        phases = [*self._phases, "student", "teacher", "optimizer"]
        self.aloud.write(
            "result",
            status="ok",
            mapping={"hidden": str(pair.hidden), "attention": str(pair.attention)},
            reports=reports,
            yardstick={task: asdict(one) for task, one in self.yardstick.items()},
            steps=steps,
            cohort=len(self.genomes),
            wall_s=dict.fromkeys(phases, 0.1),
            **{key: progress[key] for key in ("losses", "total", "tokens_per_s", "peak_memory_gib")},
            **({"layers": self._layers(pair)} if self.proxy.layer_table else {}),
            **scores,
            **mine,
            **EXECUTION,
        )

    def _layers(self, pair: MappingPair) -> list[list[float]]:
        """One where layers are compared, one half elsewhere."""
        trained = trained_pairs(self.config.loss, pair)
        sizes = (self.layers["student_layers"] + 1, self.layers["teacher_layers"] + 1)
        return [[1.0 if (m, n) in trained else 0.5 for n in range(sizes[1])] for m in range(sizes[0])]

    def _scores(self, genome: str, seed: int, step: int) -> Fields:
        """Those of a genome are alike."""
        quality, noise = Random(genome).uniform(0.6, 0.9), Random(f"{genome} {seed} {step}")
        metrics = {
            task: {name: quality + noise.uniform(-0.01, 0.01) for name in METRICS[task]}
            for task in (*self.proxy.tasks, *self.proxy.other_tasks)
        }
        scores = {task: fmean(values.values()) for task, values in metrics.items()}
        return {"metrics": metrics, "scores": scores, "fitness": fitness_of(scores, self.yardstick)}

    def _progress(self, genome: str, step: int) -> Fields:
        """What a monitor says of a step, with ones for numbers."""
        pair, loss = self.genomes[genome], self.config.loss
        mapped = {"hidden": (loss.hidden, pair.hidden), "attention": (loss.attention, pair.attention)}
        terms = {
            f"{name}/{student}-{teacher}": 1.0
            for name, (weight, mapping) in mapped.items()
            for student, teacher in (mapping.pairs if weight else ())
        }
        terms |= {"embedding": 1.0} if loss.embedding else {}
        floats = ("total", "lr", "seconds", "data_wait_share", "fill", "samples_per_s", "tflops", "tokens_per_s")
        return {
            "terms": terms,
            "losses": {term.partition("/")[0]: 1.0 for term in terms},
            "rho": {f"{student}-{teacher}": 1.0 for student, teacher in pair.attention.pairs},
            "grad_norm": None if step in self.proxy.report_at else 1.0,
            "loss_scale": None,
            "skipped_steps": 0,
            "tokens": 100,
            "time_share": dict.fromkeys(("student", "teacher", "optimizer"), 0.3),
            "peak_memory_gib": 0.5,
            **dict.fromkeys(floats, 1.0),
        }


if __name__ == "__main__":
    text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8")
    told = json.loads(os.environ.get("STAND_IN", "{}"))
    sys.exit(StandIn(read_config(ProxyJobConfig, yaml.safe_load(text)), told).run())
