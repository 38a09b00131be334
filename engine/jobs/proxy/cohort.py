"""The students of a proxy job that are trained side by side: built, stepped by the one Trainer, and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.data.batch import Batch
from engine.jobs.distill.build import build_module, flops_per_token, initial_student
from engine.jobs.distill.plan import Plan, describe_for_export
from engine.jobs.proxy.evaluators import Scores
from engine.jobs.proxy.plan import Genome
from engine.jobs.proxy.teacher_cache import AnyTeacher
from engine.losses.measure import TeacherSlice, begin
from engine.models.capture import hidden_states
from engine.models.compact_embedding import whole_vocabulary
from engine.ranks.runtime import Runtime
from engine.records.run_dir import RunDir, as_yaml
from engine.train.deepspeed_engine import DeepSpeedModel, full_state
from engine.train.export import rebuild_student, write_model
from engine.train.monitor import Monitor
from engine.train.trainee import SequenceIds, Trainee


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
    """The step after which its intermediate fitness was below proxy.stop_below."""
    evaluate_s: float = 0.0
    """Seconds that all its scores took."""

    @property
    def diverged(self) -> bool:
        return self.trainee is not None and self.trainee.diverged

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """The student's hidden states as engine.models.capture.hidden_states returns them."""
        if self.trainee is None:
            return hidden_states(self.student, batch, layers)
        states: tuple[torch.Tensor, ...] = self.trainee.model(batch, layers=layers)
        return states

    @property
    def layers(self) -> int:
        return self.plan.student_shape.layers

    def evaluating(self, on: bool) -> None:
        """Dropout off (or on again)."""
        owner: Any = self.student if self.trainee is None else self.trainee.model
        owner.train(not on)

    @property
    def seed(self) -> int:
        return self.plan.config.seed

    def save(self, folder: Path) -> None:
        """Collective. Writes the student as a Hugging Face folder, in fp32."""
        student = self.copied()
        if student is not None:
            steps = 0 if self.trainee is None else self.plan.config.train.steps
            write_model(student, {**self._description, "step": steps}, {}, self.tokenizer, folder)
        torch.distributed.barrier()

    def copied(self) -> PreTrainedModel | None:
        """Collective. On rank 0 the student as it is saved: with every word's embedding, in fp32 on the CPU, from the
        optimizer's master weights where there are any. None on the others."""
        weights = full_state(self.student)
        if torch.distributed.get_rank() != 0:
            return None
        return rebuild_student(self._description, whole_vocabulary(self.student, weights))

    @property
    def _description(self) -> dict[str, Any]:
        return describe_for_export(self.plan, self.student.config)

    def release(self) -> None:
        """Lets go of engine, optimizer and student, so that the next cohort has their memory."""
        if self.trainee is not None:
            self.trainee.monitor.close()
            self.trainee.model.release()
            self.trainee = None


def build_member(
    genome: Genome,
    base: Plan,
    seed: int,
    *,
    teacher: AnyTeacher | None,
    cohort: int,
    tokens: torch.Tensor,
    on: TeacherSlice | None,
    sequence_ids: SequenceIds,
    runtime: Runtime,
    run_dir: RunDir,
) -> Member:
    """base: a plan for what does not depend on the genome. cohort: how many students share the teacher's passes.
    tokens: ids that the student will meet, each once. on: what its losses are measured on."""
    plan = genome.plan or base
    plan = replace(
        plan,
        config=replace(plan.config, seed=seed),
        mapping=genome.mapping,  # that of base is not the genome's
    )
    if genome.plan is None or teacher is None:
        untrained = initial_student(plan, with_mlm_head=False)
        nn.Module.to(untrained, device=runtime.device, dtype=getattr(torch, plan.execution.precision))
        return Member(genome, plan, untrained, run_dir.tokenizer, trainee=None)
    module, chosen = build_module(plan, runtime.device, tokens=tokens)
    if on is not None:
        begin(module, on)
    flops = flops_per_token(plan, teacher, module, share_of_teacher=1.0 / cohort)
    monitor = Monitor(
        active=runtime.is_rank_zero,
        tensorboard=run_dir.tensorboard / f"{genome.mapping.file_name}-seed{seed}",
        records=run_dir.records,
        steps=plan.config.train.steps,
        flops_per_token=flops,
        device=runtime.device,
        config_text=as_yaml(plan.config),
        labels={"genome": genome.key, "seed": seed},
        part_of_a_job=True,
        name=genome.key,
    )
    trainee = Trainee(
        DeepSpeedModel(module, chosen.optimizer, plan.config.train, plan.execution),
        train=plan.config.train,
        terms=plan.losses,
        execution=plan.execution,
        runtime=runtime,
        monitor=monitor,
        sequence_ids=sequence_ids,
    )
    return Member(genome, plan, module.student, run_dir.tokenizer, trainee)


@dataclass
class IntermediateScores:
    """An Evaluation (engine/train/trainer.py): scores every student that is still alive at the steps of
    proxy.report_at, and stops those below the threshold of that step."""

    members: Sequence[Member]
    steps: frozenset[int]
    stop_below: Mapping[int, float]
    score: Callable[[Member], Scores]
    enough: bool = False

    def due(self, step: int, *, last: bool) -> bool:
        return step in self.steps

    def state(self) -> dict[str, Any]:
        return {}

    def __call__(self, step: int) -> bool:
        for member in self.members:
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
        return False
