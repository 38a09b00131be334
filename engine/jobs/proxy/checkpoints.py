"""Checkpoints of a proxy job: each student has a folder of them, and students that have one of the same step go on side
by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.config.distill import TrainConfig
from engine.jobs.distill.plan import Plan, identity
from engine.jobs.proxy.facts import code_version
from engine.jobs.proxy.plan import Genome, ProxyPlan
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime
from engine.records.run_dir import RunDir, step_tag, tag_step
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.checkpoint_files import remove_checkpoint
from engine.train.checkpoint_storage import storage_of

KEEP = 2
"""Number of checkpoints of a student: a job that is killed while it writes the last one of some students continues all
from the one before."""


@dataclass(frozen=True)
class Start:
    """Genomes that are trained side by side, and where from."""

    genomes: Sequence[Genome]
    step: int = 0
    """Optimizer steps that are done."""
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    """Checkpoint by genome; empty at step 0."""


def step_before_decay(train: TrainConfig) -> int | None:
    """Returns the last optimizer step before the decay of warmup_stable_decay: a longer run is the same up to there.
    None with other schedules."""
    return train.steps - train.decay_steps if train.schedule == "warmup_stable_decay" else None


class StudentCheckpoints:
    """The checkpoints of every student of a job with proxy.save_every."""

    def __init__(self, plan: ProxyPlan, run_dir: RunDir, runtime: Runtime) -> None:
        run_dir.require_no_patterns()
        self._resume = plan.config.resume
        self._run_dir, self._runtime = run_dir, runtime
        self.keep_step = step_before_decay(plan.base.config.train)
        """Step whose checkpoints outlast a result; None: there is none."""

    def checkpointer(self, genome: Genome, plan: Plan) -> Checkpointer:
        """Returns the checkpointer of a student. plan: its own, with its seed."""
        folder = self._run_dir.root / "cohorts" / f"{genome.mapping.file_name}-seed{plan.config.seed}"
        return Checkpointer(
            run_dir=RunDir(folder),
            execution=plan.execution,
            runtime=self._runtime,
            identity=identity(plan) | {"code": code_version()},
            keep=KEEP,
            storage=storage_of("shared", self._runtime),
        )

    def divide(self, genomes: Sequence[Genome], seed: int) -> list[Start]:
        """Returns groups of genomes whose students continue from the same step: the newest that most of them have, and
        so on. Removes checkpoints from after it. Raises UserError for those of a run that computes something else.
        Collective."""
        checkpointers = {
            genome.key: self.checkpointer(genome, replace(genome.plan, config=replace(genome.plan.config, seed=seed)))
            for genome in genomes
            if genome.plan is not None
        }
        newest = {key: of.choose(self._resume) for key, of in checkpointers.items()}
        tags = from_rank_zero(
            lambda: {
                key: [tag for tag in checkpointers[key].run_dir.complete_tags() if tag_step(tag) <= tag_step(at.tag)]
                for key, at in newest.items()
                if at is not None
            }
        )
        starts = []
        left = list(genomes)
        while counted := Counter(tag for genome in left for tag in tags.get(genome.key, ())):
            tag = max(counted, key=lambda tag: (counted[tag], tag_step(tag)))
            group = [genome for genome in left if tag in tags.get(genome.key, ())]
            chosen = {genome.key: self._choose(checkpointers[genome.key], newest[genome.key], tag) for genome in group}
            starts.append(Start(group, tag_step(tag), chosen))
            left = [genome for genome in left if genome.key not in chosen]
        return [*starts, Start(left)] if left else starts

    def _choose(self, checkpointer: Checkpointer, newest: Chosen | None, tag: str) -> Chosen:
        chosen = newest if newest is not None and newest.tag == tag else checkpointer.choose(tag)
        assert chosen is not None
        if self._runtime.is_rank_zero:
            checkpointer.clean()
            for later in checkpointer.run_dir.complete_tags():
                if tag_step(later) > tag_step(tag):
                    remove_checkpoint(checkpointer.run_dir.checkpoints / later)
        return chosen

    def finish(self, checkpointer: Checkpointer) -> None:
        """Removes what a student with a result needs no longer: all but the checkpoint from before its decay."""
        folder = checkpointer.run_dir
        for tag in folder.complete_tags() if self._runtime.is_rank_zero else ():
            if self.keep_step is None or tag != step_tag(self.keep_step):
                remove_checkpoint(folder.checkpoints / tag)
