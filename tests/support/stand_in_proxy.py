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

import io
import json
import os
import sys
import time
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import yaml

from engine.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_DIVERGED, EXIT_DONE
from engine.mapping import LayerMapping, parse_mapping
from engine.records.fingerprints import digest
from engine.records.records import RecordWriter, format_record
from engine.records.run_dir import RunDir

METRICS = {"SST-2": ("accuracy",), "MRPC": ("accuracy", "f1"), "STS-B": ("pearson", "spearman")}
CODE = ("mapdistill", "torch", "deepspeed", "transformers", "torchmetrics")
Fields = dict[str, Any]


class StandIn:
    def __init__(self, config: Fields, told: Fields) -> None:
        self.config, self.told, self.proxy = config, told, config["proxy"]
        self.teacher = json.loads((Path(config["teacher"]["path"]) / "config.json").read_text())
        self.corpus = json.loads((Path(config["data"]["path"]) / "manifest.json").read_text())
        self.maps = {self._key(text): self._maps(text) for text in config["genomes"]}
        self.seeds = list(range(config["seed"], config["seed"] + self.proxy["repeats"]))
        self.parts = self._fingerprint_parts()
        self.execution = {"precision": "float32", "world_size": 1, "zero_stage": 0}
        self.facts = {"genomes": list(self.maps), "seeds": self.seeds, "fingerprint": digest(self.parts)}
        self.facts |= self.execution

    def _maps(self, text: str) -> tuple[LayerMapping, LayerMapping]:
        sizes = {
            "student_layers": self.config["student"]["layers"],
            "teacher_layers": self.teacher["num_hidden_layers"],
        }
        hidden, _, attention = text.partition("/")
        return parse_mapping(hidden, **sizes), parse_mapping(attention or hidden, **sizes)

    def _key(self, text: str) -> str:
        return "/".join(dict.fromkeys(map(str, self._maps(text))))

    def _fingerprint_parts(self) -> Fields:
        """As in engine/jobs/proxy/plan.py, without reading weights and rows."""
        c = self.config
        how = ("attention", "activation_checkpointing", "fused_layer_norm")
        training = {key: c["train"][key] for key in ("global_batch", "lr", "warmup_steps", "schedule", "grad_clip")}
        return {
            "teacher": {
                "config_sha256": digest(self.teacher),
                "weights_sha256": digest(c["teacher"]["path"]),
                "dtype": "float32",
            },
            "student": {key: value for key, value in c["student"].items() if key not in how},
            "losses": c["loss"],
            "data": {
                "content_sha256": digest(self.corpus),
                "seq_len": self.corpus["seq_len"],
                "mlm_probability": c["data"]["mlm_probability"],
                "whole_word_mask": c["data"]["whole_word_mask"],
            },
            "training": {
                "steps": self.proxy["steps"],
                **training,
                "optimizer": c["optim"],
                "precision": "float32",
            },
            "tasks": {task: {"sha256": digest(task), "metrics": list(METRICS[task])} for task in self.proxy["tasks"]},
            "evaluator": {"kind": self.proxy["evaluator"], "folds": self.proxy["folds"]},
            "code": dict.fromkeys(CODE, "0"),
        }

    def run(self) -> int:
        if "refuses" in self.told:
            print(f"error: {self.told['refuses']}", file=sys.stderr)
            return EXIT_BAD_INPUT
        if self.config["dry_run"]:
            facts = {
                "student_layers": self.config["student"]["layers"],
                "teacher_layers": self.teacher["num_hidden_layers"],
                "sequences": sum(source["sequences"] for source in self.corpus["sources"]),
                "seq_len": self.corpus["seq_len"],
                "tasks": self.proxy["tasks"],
                "fingerprint_parts": self.parts,
            }
            print(format_record("run", status="planned", **self.facts, **facts))
            return EXIT_DONE
        records = RunDir(Path(self.config["output_dir"])).records
        self.aloud = RecordWriter(records)
        self.silent = RecordWriter(records, stream=io.StringIO())  # what the students' monitors write
        self.aloud.write("run", status="started", fingerprint_parts=self.parts, **self.facts)
        if len(self.maps) > self.told.get("fits", len(self.maps)):
            print("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
            return EXIT_CRASH
        ended = [self._cohort(seed) for seed in self.seeds]
        wall = dict.fromkeys(("start", "encode", "load", "train", "evaluate"), 0.1)
        self.aloud.write("run", status="finished", signal=None, wall_s=wall, **self.facts)
        return EXIT_DONE if any(ended) else EXIT_DIVERGED

    def _cohort(self, seed: int) -> bool:
        """Whether any genome has a result, or was stopped early."""
        last, every = self.proxy["steps"], self.config["train"]["log_every"]
        reports: dict[str, dict[str, float]] = {genome: {} for genome in self.maps}
        stopped: dict[str, int] = {}
        for step in sorted({*self.proxy["report_at"], *range(every, last, every), last}):
            alive = [genome for genome in self.maps if genome not in stopped and not self._diverges(genome)]
            for genome in alive:
                self.silent.write("step", genome=genome, seed=seed, **self._progress(genome, step))
            for genome in alive if step in self.proxy["report_at"] else ():
                scores = self._scores(genome, seed, step)
                self.silent.write("step", genome=genome, seed=seed, step=step, **scores)
                reports[genome][str(step)] = scores["fitness"]
                if scores["fitness"] < self.proxy["stop_below"].get(step, 0.0):
                    stopped[genome] = step
        for genome in self.maps:
            self._finish(genome, seed, reports[genome], stopped.get(genome))
        return any(not self._diverges(genome) for genome in self.maps)

    def _diverges(self, genome: str) -> bool:
        return self.told.get("genomes", {}).get(genome) == "diverges"

    def _finish(self, genome: str, seed: int, reports: dict[str, float], stopped: int | None) -> None:
        mine = {"genome": genome, "seed": seed, "fingerprint": self.facts["fingerprint"]}
        if self._diverges(genome):
            self.aloud.write("error", status="diverged", **mine)
            return
        if stopped is not None:
            at = {"step": stopped, "fitness": reports[str(stopped)]}
            self.aloud.write("step", status="stopped", reports=reports, **at, **mine)
            return
        time.sleep(self.told.get("seconds", 0.0))
        if self.told.get("genomes", {}).get(genome) == "crashes":
            raise RuntimeError(f"told to crash at {genome}")
        steps = self.proxy["steps"]
        progress, scores = self._progress(genome, steps), self._scores(genome, seed, steps)
        self.silent.write("step", genome=genome, seed=seed, step=steps, **scores)
        phases = ("start", "encode", "load", "train", "evaluate", "student", "teacher", "optimizer")
        self.aloud.write(
            "result",
            status="ok",
            mapping=dict(zip(("hidden", "attention"), map(str, self.maps[genome]), strict=True)),
            reports=reports,
            steps=steps,
            cohort=len(self.maps),
            wall_s=dict.fromkeys(phases, 0.1),
            **{key: progress[key] for key in ("losses", "total", "tokens_per_s", "peak_memory_gib")},
            **scores,
            **mine,
            **self.execution,
        )

    def _scores(self, genome: str, seed: int, step: int) -> Fields:
        """Those of a genome are alike."""
        quality, noise = Random(genome).uniform(0.6, 0.9), Random(f"{genome} {seed} {step}")
        metrics = {
            task: {name: quality + noise.uniform(-0.01, 0.01) for name in METRICS[task]} for task in self.proxy["tasks"]
        }
        scores = {task: fmean(values.values()) for task, values in metrics.items()}
        return {"metrics": metrics, "scores": scores, "fitness": fmean(scores.values())}

    def _progress(self, genome: str, step: int) -> Fields:
        pairs = dict(zip(("hidden", "attention"), self.maps[genome], strict=True))
        terms = {
            f"{name}/{student}-{teacher}": 1.0
            for name, mapping in pairs.items()
            if self.config["loss"][name]
            for student, teacher in mapping.pairs
        }
        terms |= {"embedding": 1.0} if self.config["loss"]["embedding"] else {}
        floats = ("total", "lr", "seconds", "data_wait_share", "fill", "samples_per_s", "tflops", "tokens_per_s")
        return {
            "step": step,
            "terms": terms,
            "losses": {term.partition("/")[0]: 1.0 for term in terms},
            "rho": {f"{student}-{teacher}": 1.0 for student, teacher in pairs["attention"].pairs},
            "grad_norm": None if step in self.proxy["report_at"] else 1.0,
            "loss_scale": None,
            "skipped_steps": 0,
            "tokens": 100,
            "time_share": dict.fromkeys(("student", "teacher", "optimizer"), 0.3),
            "peak_memory_gib": 0.5,
            **dict.fromkeys(floats, 1.0),
        }


if __name__ == "__main__":
    config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8"))
    sys.exit(StandIn(config, json.loads(os.environ.get("STAND_IN", "{}"))).run())
