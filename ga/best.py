"""The configuration of a whole distillation with the mapping that a search has found."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path

from engine.config.distill import DataConfig, MappingConfig, RunConfig, StudentConfig, TrainConfig
from engine.records.run_dir import as_yaml
from ga.config import SearchConfig
from ga.jobs.proxy_facts import ProxyFacts

WARMUP_SHARE = 0.05


def best_config(config: SearchConfig, facts: ProxyFacts, genome: str) -> RunConfig:
    """Teacher, student, losses and optimizer of the proxy; one pass over the corpus at launch/distill.py's own batch
    and learning rate."""
    hidden, _, attention = genome.partition("/")
    train = TrainConfig()
    held_out = DataConfig.eval_sequences
    steps = max(1, (facts.sequences - held_out) // train.global_batch)
    return RunConfig(
        output_dir=str(config.root / "best"),
        seed=config.seed,
        allow_pickle=config.allow_pickle,
        teacher=config.teacher,
        student=StudentConfig(**{one.name: getattr(config.student, one.name) for one in fields(StudentConfig)}),
        mapping=MappingConfig(hidden=hidden, attention=attention or None),
        loss=config.loss,
        data=replace(config.data, eval_sequences=held_out),
        optim=config.optim,
        kernels=config.kernels,
        train=replace(train, steps=steps, warmup_steps=round(WARMUP_SHARE * steps)),
    )


def as_commented_yaml(config: RunConfig, *, path: Path, why: str) -> str:
    """The text of that file. why: comment at the top."""
    return f"# {why}\n# deepspeed launch/distill.py --config {shlex.quote(str(path))}\n{as_yaml(config)}"
