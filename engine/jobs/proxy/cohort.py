"""The students of a proxy job that are trained side by side: built, stepped by the one Trainer, and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.data.batch import Batch
from engine.data.loader import CorpusLoader
from engine.jobs.distill.build import build_module, flops_per_token, initial_student
from engine.jobs.distill.plan import Plan, describe_for_export
from engine.jobs.proxy.checkpoints import Start, StudentCheckpoints
from engine.jobs.proxy.evaluators import Scores
from engine.jobs.proxy.plan import Genome
from engine.jobs.proxy.teacher_cache import AnyTeacher
from engine.losses.measure import Measured, TeacherSlice, begin, sequences_of
from engine.models.capture import hidden_states
from engine.models.compact_embedding import whole_vocabulary
from engine.ranks.collectives import gathered
from engine.ranks.runtime import Runtime
from engine.records.history import History
from engine.records.records import OnRecord
from engine.records.run_dir import RunDir, as_yaml
from engine.train.deepspeed_engine import DeepSpeedModel, full_state
from engine.train.export import rebuild_student, write_model
from engine.train.monitor import Monitor
from engine.train.trainee import Trainee


@dataclass
class Member:
    """One genome of a cohort, with its student."""

    genome: Genome
    plan: Plan
    student: PreTrainedModel
    tokenizer: Path
    """Folder of the tokenizer that goes with a saved student."""
    trainee: Trainee | None
    """None for a genome that no loss reaches: its student is scored as it was initialised."""
    reports: dict[int, Scores] = field(default_factory=dict)
    """Intermediate scores by step."""
    stopped_at: int | None = None
    """Step after which its intermediate fitness was below proxy.stop_below."""
    evaluate_s: float = 0.0
    """Seconds that all its scores took."""

    @property
    def diverged(self) -> bool:
        return self.trainee is not None and self.trainee.diverged

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """Returns the student's hidden states as engine.models.capture.hidden_states does."""
        if self.trainee is None:
            return hidden_states(self.student, batch, layers)
        states: tuple[torch.Tensor, ...] = self.trainee.model(batch, layers=layers)
        return states

    @property
    def layers(self) -> int:
        """Number of the student's layers"""
        return self.plan.student_shape.layers

    def evaluating(self, on: bool) -> None:
        """Turns dropout off, or on again."""
        owner: Any = self.student if self.trainee is None else self.trainee.model
        owner.train(not on)

    @property
    def seed(self) -> int:
        """Seed of the cohort"""
        return self.plan.config.seed

    def save(self, folder: Path) -> None:
        """Writes the student as a Hugging Face folder, in fp32. Collective."""
        student = self.copy_student()
        if student is not None:
            history = History() if self.trainee is None else self.trainee.monitor.history
            description = {**self._description, "step": self.steps}
            write_model(student, description, {}, self.tokenizer, folder, history=history)
        torch.distributed.barrier()

    @property
    def steps(self) -> int:
        """Number of optimizer steps that the student learns for"""
        return 0 if self.trainee is None else self.plan.config.train.steps

    def copy_student(self) -> PreTrainedModel | None:
        """Returns, on rank 0, the student as it is saved: with every word's embedding, in fp32 on the CPU, from the
        optimizer's master weights where there are any; None on the others. Collective."""
        weights = full_state(self.student)
        if torch.distributed.get_rank() != 0:
            return None
        return rebuild_student(self._description, whole_vocabulary(self.student, weights))

    @property
    def _description(self) -> dict[str, Any]:
        return describe_for_export(self.plan, self.student.config)

    def as_record(self, scores: Scores) -> dict[str, Any]:
        """Returns what the `result` record says of the student."""
        mapping = self.genome.mapping
        fields = {
            "genome": self.genome.key,
            "seed": self.seed,
            "mapping": {
                "hidden": str(mapping.hidden),
                "attention": str(mapping.attention),
                **({} if mapping.kept is None else {"kept": mapping.kept}),
            },
            "scores": scores.tasks,
            "metrics": scores.metrics,
            "fitness": scores.fitness,
            "reports": {str(step): report.fitness for step, report in self.reports.items()},
            "steps": self.steps,
        }
        if self.trainee is None or not self.trainee.monitor.history.steps:  # they are on rank 0
            return fields
        history = self.trainee.monitor.history
        losses = {"losses": history.last["losses"], "total": history.last["total"]}
        return fields | losses | {"tokens_per_s": history.tokens_per_s}

    def release(self) -> None:
        """Lets go of engine, optimizer and student, so that the next cohort has their memory."""
        if self.trainee is not None:
            self.trainee.monitor.close()
            self.trainee.model.release()
            self.trainee = None


@dataclass(frozen=True)
class Cohort:
    """Teacher, data and ranks that students trained side by side share."""

    base: Plan
    """Plan of what does not depend on the genome, with the cohort's seed."""
    start: Start
    """Genomes of the students, and where they continue."""
    teacher: AnyTeacher | None
    """Teacher, whose passes they share; None when none of them learns."""
    loader: CorpusLoader
    tokens: torch.Tensor | None
    """(n,) int64 ids that a student will meet, each once; None: it has the whole vocabulary."""
    runtime: Runtime
    run_dir: RunDir
    checkpoints: StudentCheckpoints | None
    """Checkpoints of the students, where they have any."""
    on_record: OnRecord | None = None
    """Function that is called with each record."""

    def _measure_slice(self) -> TeacherSlice | None:
        """Returns what losses of new students are measured on; None where no loss looks at it. Collective."""
        plans = [genome.plan for genome in self.start.genomes if genome.plan is not None]
        if self.teacher is None or self.start.step or not any(plan.losses.looks_at_slice for plan in plans):
            return None
        batches = self.loader.first_batches(sequences_of(self.base.config.loss, self.base.seq_len))
        return TeacherSlice(batches, self.teacher, self.runtime.device, self.base.teacher_shape)

    def build_members(self) -> list[Member]:
        """Returns the members, before their first step. Collective."""
        teacher_slice = self._measure_slice()
        return [self._build(genome, teacher_slice) for genome in self.start.genomes]

    def _build(self, genome: Genome, teacher_slice: TeacherSlice | None) -> Member:
        plan, device = genome.plan or genome.start(self.base), self.runtime.device
        config = replace(plan.config, seed=self.base.config.seed)
        plan = replace(plan, config=config)
        if genome.plan is None or self.teacher is None:
            untrained = initial_student(plan, with_mlm_head=False)
            nn.Module.to(untrained, device=device, dtype=getattr(torch, plan.execution.precision))
            return Member(genome, plan, untrained, self.run_dir.tokenizer, trainee=None)
        module, chosen = build_module(plan, device, tokens=self.tokens)
        measured = Measured() if teacher_slice is None else begin(module, teacher_slice)
        monitor = Monitor(
            active=self.runtime.is_rank_zero,
            tensorboard=self.run_dir.tensorboard / f"{genome.mapping.file_name}-seed{config.seed}",
            records=self.run_dir.records,
            steps=config.train.steps,
            flops_per_token=flops_per_token(plan, self.teacher, module, share_of_teacher=1.0 / len(self.start.genomes)),
            device=device,
            config_text=as_yaml(config),
            labels={"genome": genome.key, "seed": config.seed},
            name=genome.key,
            on_record=self.on_record,
        )
        model = DeepSpeedModel(module, chosen.optimizer, config.train, plan.execution)
        checkpointer = None if self.checkpoints is None else self.checkpoints.checkpointer(genome, plan)
        reports: dict[int, Scores] = {}
        if checkpointer is not None and genome.key in self.start.chosen:
            state = checkpointer.load(model, self.start.chosen[genome.key])
            measured = Measured(**state["measured"])
            module.losses = plan.losses.scaled(measured.scales)
            reports = {step: Scores(**of) for step, of in state["reports"].get(genome.key, {}).items()}
        trainee = Trainee(
            model,
            train=config.train,
            terms=plan.losses,
            execution=plan.execution,
            runtime=self.runtime,
            monitor=monitor,
            sequence_ids=self.loader.sequence_ids,
            checkpointer=checkpointer,
            kept={"measured": asdict(measured)},
        )
        return Member(genome, plan, module.student, self.run_dir.tokenizer, trainee, reports)


def tokens_met(base: Plan, loader: CorpusLoader, in_texts: torch.Tensor) -> torch.Tensor:
    """Returns the ids that a student will meet, each once (n,): in its batches, in what its losses are measured on, and
    `in_texts`, where it is scored. Collective."""
    ids = [in_texts]
    ids += [batch.input_ids.flatten() for batch in loader.first_batches(sequences_of(base.config.loss, base.seq_len))]
    for step in range(base.config.train.steps):
        ids += [micro.input_ids.flatten() for micro in loader.step(step).micro]
    tokens = torch.unique(torch.cat(ids))
    return torch.unique(torch.cat(gathered(tokens)))


@dataclass
class IntermediateScores:
    """An Evaluation (engine/train/trainer.py): scores every student that is still alive at the steps of
    proxy.report_at, and stops those below the threshold of that step."""

    members: Sequence[Member]
    steps: frozenset[int]
    stop_below: Mapping[int, float]
    score: Callable[[Member], Scores]
    keep_step: int | None = None
    """Step whose checkpoints are kept; None: there is none."""
    at_start: bool = False
    enough: bool = False

    def due(self, step: int, *, last: bool) -> bool:
        """Returns whether to score after `step`, or to keep its checkpoint."""
        return step in self.steps or step == self.keep_step

    def state(self) -> dict[str, Any]:
        """Returns the intermediate scores of all students, and which checkpoint to keep."""
        reports = {
            member.genome.key: {step: asdict(scores) for step, scores in member.reports.items()}
            for member in self.members
        }
        return {"reports": reports, "keep_step": self.keep_step}

    def __call__(self, step: int) -> bool:
        """Scores the students at a step that reports; returns whether its checkpoint is to be kept. Collective."""
        for member in self.members if step in self.steps else ():
            trainee = member.trainee
            # losses are looked at on log steps only, and no score may come from weights that are not finite
            if trainee is None or trainee.diverged or trainee.stopped or not trainee.check_weights(step):
                continue
            scores = self.score(member)
            member.reports[step] = scores
            trainee.monitor.scores(step, scores.tasks, metrics=scores.metrics, fitness=scores.fitness)
            if scores.fitness < self.stop_below.get(step, -math.inf):
                trainee.stopped = True
                member.stopped_at = step
        return step == self.keep_step
