"""Distillations, proxy jobs and fine-tunings from Python (docs/api.md); ga/api.py has the search.

A job runs in the calling process, which is a rank where a launcher has started it. Nothing heavy is imported before a
job is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import Settings, read_config
from engine.config.tools import PrepareConfig
from engine.ranks.process import guest
from engine.records.records import OnRecord, final_result, read_records
from engine.records.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.losses.base import Loss

Record = dict[str, Any]


@dataclass(frozen=True)
class JobResult:
    """What a job has left in its folder, or has left so far; it is read anew each time. On rank 0's host."""

    folder: Path

    @property
    def records(self) -> list[Record]:
        """All records of records.jsonl, in order; none without that file"""
        path = RunDir(self.folder).records
        return read_records(path) if path.is_file() else []

    @property
    def result(self) -> Record:
        """The `result` record of the last start, or an empty one"""
        return final_result(self.records) or {}


class Distillation(JobResult):
    @property
    def student(self) -> Path:
        """Hugging Face folder of the student"""
        return RunDir(self.folder).student

    @property
    def held_out(self) -> list[Record]:
        """Held-out losses, oldest first: `step`, `total` (weighted sum), `terms` (each by its name, without weights)"""
        steps = {one["step"]: one["held_out"] for one in self.records if one["kind"] == "step" and "held_out" in one}
        return [{"step": step, **losses} for step, losses in sorted(steps.items())]

    def load(self) -> PreTrainedModel:
        """Returns the student, on the CPU, in fp32."""
        return _load(self.student)


class FineTuning(JobResult):
    @property
    def scores(self) -> dict[str, float | None]:
        """Dev score (0 to 1, mean over seeds) by task, of the point that was chosen; None where all diverged"""
        tasks = self.result.get("tasks", {})
        return {name: None if task is None else task["score"] for name, task in tasks.items()}

    def model(self, task: str) -> Path:
        """Returns the Hugging Face folder of the model of a task."""
        return self.folder / task / "model"

    def load(self, task: str) -> PreTrainedModel:
        """Returns the model of a task with its head, on the CPU, in fp32."""
        return _load(self.model(task))


class ProxyScores(JobResult):
    @property
    def results(self) -> list[Record]:
        """`result` records, each of one genome and seed; of one that was scored again, the last"""
        found = [one for one in self.records if one["kind"] == "result"]
        return list({(one["fingerprint"], one["genome"], one["seed"]): one for one in found}.values())

    @property
    def fitness(self) -> dict[str, dict[int, float]]:
        """Fitness by genome (as `2-4-6`, not `uniform`) and seed, of the last fingerprint; larger is better"""
        results = self.results
        by_genome: dict[str, dict[int, float]] = {}
        for one in results:
            if one["fingerprint"] == results[-1]["fingerprint"]:
                by_genome.setdefault(one["genome"], {})[one["seed"]] = one["fitness"]
        return by_genome


def distill(
    *settings: Settings,
    own_losses: Mapping[type[Loss], float] | None = None,
    on_record: OnRecord | None = None,
) -> Distillation:
    """Runs or continues a distillation, as launch/distill.py does. Collective.

    settings: files, mappings or a RunConfig; later ones win. own_losses: classes of losses beside those of the
    settings, each with its weight. on_record: is called on rank 0 with each record when it is written.

    Raises UserError for bad settings or input, Diverged, RunFailure, and Preempted (a KeyboardInterrupt) after Ctrl-C
    or SIGTERM, once what is done is saved.
    """
    config = read_config(RunConfig, *settings)
    with _job():
        from engine.jobs.distill.job import distill as run

        run(config, own_losses=own_losses or {}, on_record=on_record or _ignore)
    return Distillation(Path(config.output_dir))


def finetune(*settings: Settings, on_record: OnRecord | None = None) -> FineTuning:
    """Runs or continues fine-tunings, as launch/finetune.py does. Collective.

    settings: files, mappings or a FinetuneConfig; later ones win. on_record: as of `distill`; records of one
    fine-tuning have its name as `unit`. Raises as `distill` does; Diverged when a task has no score.
    """
    config = read_config(FinetuneConfig, *settings)
    with _job():
        from engine.jobs.finetune.job import finetune as run

        run(config, on_record=on_record or _ignore)
    return FineTuning(Path(config.output_dir))


def proxy(
    *settings: Settings,
    own_losses: Mapping[type[Loss], float] | None = None,
    own_evaluator: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    on_record: OnRecord | None = None,
) -> ProxyScores:
    """Distils and scores several layer mappings side by side, as launch/proxy.py does. Collective.

    settings: files, mappings or a ProxyJobConfig; later ones win. own_losses, on_record: as of `distill`.
    own_evaluator: takes a student as a Hugging Face model, on rank 0, and returns a score (larger is better) for each
    name in proxy.tasks and proxy.other_tasks. Raises as `distill` does; Diverged when no student has a score.
    """
    began = time.time()
    config = read_config(ProxyJobConfig, *settings)
    with _job():
        from engine.jobs.proxy.job import proxy as run

        run(
            config,
            own_losses=own_losses or {},
            own_evaluator=own_evaluator,
            on_record=on_record or _ignore,
            began=began,
        )
    return ProxyScores(Path(config.output_dir))


def prepare_data(*settings: Settings) -> Path:
    """Turns text into a corpus, as launch/prepare_data.py does; returns its folder. Raises UserError, and Preempted
    after Ctrl-C or SIGTERM. settings: files, mappings or a PrepareConfig; later ones win."""
    config = read_config(PrepareConfig, *settings)
    from engine.data.prepare.corpus import prepare

    prepare(config)
    return Path(config.output_dir)


def _load(folder: Path) -> PreTrainedModel:
    from engine.train.export import load_export

    return load_export(folder)


@contextmanager
def _job() -> Iterator[None]:
    """Runs a job as a guest; at its end rank 0 has written all."""
    with guest():
        yield
        import torch

        torch.distributed.barrier()


def _ignore(record: Record) -> None:
    """Makes a job without a listener print no records, which a program reads from its result."""
