"""What a proxy job will do, checked before any model is loaded: its genomes, its tasks, and the fingerprint of all that
makes two fitness values comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config.deepspeed_file import FOLDER
from engine.config.distill import RunConfig
from engine.config.proxy import ProxyJobConfig
from engine.data.manifest import corpus_hash
from engine.errors import UserError
from engine.jobs.distill.plan import Plan, make_plan, starting_student, with_mapping
from engine.jobs.execution import plan_execution
from engine.jobs.proxy.facts import given_parts
from engine.losses.base import NO_LOSSES, OwnLosses
from engine.losses.own import identity_of
from engine.losses.registry import LOSSES
from engine.mapping import MappingPair
from engine.models.hub import model_hashes
from engine.ranks.runtime import has_fast_bf16, uses_gpu
from engine.records.fingerprints import digest, source_hash
from engine.tasks.load import TaskData, load_task, resolve_names
from engine.tasks.specs import require_trainable, task_spec


@dataclass(frozen=True)
class Genome:
    """One candidate of a cohort."""

    mapping: MappingPair
    given: str
    """Text as the user wrote it, e.g. `uniform`."""
    asked: bool
    """Whether the user named it; else it is there to be compared with."""
    plan: Plan | None
    """Plan of its distillation; None when no loss is left to learn from (all layers skipped and no other loss): the
    student is scored as it was initialised."""

    @property
    def key(self) -> str:
        """Text as records name it"""
        return str(self.mapping)

    def start(self, base: Plan) -> Plan:
        """Returns a plan of the student as it is initialised. base: a plan for what does not depend on the genome."""
        student = starting_student(base.config.student, self.mapping)
        return replace(base, mapping=self.mapping, config=replace(base.config, student=student))


OwnEvaluator = Callable[[Any], Mapping[str, float]]
"""Evaluator that a program brings: takes a Hugging Face model, and returns its score in each of proxy.tasks and
proxy.other_tasks (docs/api.md)."""


@dataclass(frozen=True)
class ProxyPlan:
    """Facts and choices of a job that are known before any model is loaded."""

    config: ProxyJobConfig
    base: Plan
    """Plan with the uniform mapping; what does not depend on the mapping is the same for all genomes."""
    genomes: tuple[Genome, ...]
    tasks: tuple[TaskData, ...]
    """Tasks that make the fitness, then those of proxy.other_tasks; none with an evaluator of a program."""
    own_evaluator: OwnEvaluator | None
    scored: tuple[str, ...]
    """Names of all tasks."""
    counted: tuple[str, ...]
    """Names of the tasks that make the fitness."""
    fingerprint: str
    fingerprint_parts: dict[str, Any]
    """Settings, versions and hashes that the fingerprint is made of, in readable groups."""
    warnings: tuple[str, ...] = ()
    """Lines for the banner."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that a search must know before it starts"""
        return {
            "student_layers": self.base.student_shape.layers,
            "teacher_layers": self.base.teacher_shape.layers,
            "sequences": self.base.manifest.sequences,
            "seq_len": self.base.seq_len,
            "tasks": list(self.counted),
            "fingerprint_parts": self.fingerprint_parts,
        }


def make_proxy_plan(
    config: ProxyJobConfig, own_losses: OwnLosses = NO_LOSSES, own_evaluator: OwnEvaluator | None = None
) -> ProxyPlan:
    """Reads configuration files, manifest, tokenizer and task rows, and checks them. Raises UserError."""
    names, others, absent = list(config.proxy.tasks), list(config.proxy.other_tasks), list[str]()
    if own_evaluator is None:
        names, absent = resolve_names(names, config.task)
        others, _ = resolve_names(others, config.task)
    others = [name for name in others if name not in names]
    if config.proxy.yardstick and set(config.proxy.yardstick) != set(names):
        raise UserError(
            f"proxy.yardstick has {', '.join(config.proxy.yardstick)}, but proxy.tasks are {', '.join(names)}: give a "
            "start, a teacher and a weight for each of them, or leave the yardstick out and it is measured"
        )
    if own_evaluator is None and config.proxy.evaluator == "probe":
        for key, group in (("proxy.tasks", names), ("proxy.other_tasks", others)):
            for name in group:
                if task_spec(name, config.task).kind == "span":
                    raise UserError(
                        f"{key}={name!r}: a probe cannot find answers in a text; write proxy.evaluator=finetune or "
                        "leave it out"
                    )
    if own_evaluator is None and config.proxy.evaluator == "finetune":
        for name in (*names, *others):
            require_trainable(task_spec(name, config.task), "proxy.evaluator='finetune'")
    base = make_plan(run_config(config), own_losses)
    if own_evaluator is None and config.proxy.evaluator == "finetune":
        check_finetune_batch(config, base)
    genomes = parse_genomes(config, base)
    scored = (*names, *others)
    tasks = () if own_evaluator is not None else tuple(load_task(name, config.task) for name in scored)
    parts = fingerprint_parts(config, base, tasks[: len(names)])
    parts["loss"] |= {key.partition(".")[2]: value for key, value in identity_of(own_losses).items()}
    if own_evaluator is not None:
        parts["tasks"] = {"names": names, "source": source_hash(own_evaluator)}
    warnings = [f"no folder of {', '.join(absent)} under {config.task.data_dir}: left out"] if absent else []
    warnings += [text for task in tasks for text in task.warnings]
    if trackers := base.execution.trackers:
        what = f"a proxy trains many students at once, and {' and '.join(trackers)} would take them for one run"
        warnings.append(f"{base.execution.source}: {what}; nothing is sent to it")
    return ProxyPlan(
        config, base, genomes, tasks, own_evaluator, scored, tuple(names), digest(parts), parts, tuple(warnings)
    )


def check_finetune_batch(config: ProxyJobConfig, base: Plan) -> None:
    """Raises UserError for a proxy.batch that does not fit the ranks or the DeepSpeed file: otherwise it would be found
    after the students are distilled."""
    train = replace(base.config.train, global_batch=config.proxy.batch)
    try:
        plan_execution(base.config.deepspeed_config, train, config.optim)
    except UserError as error:
        raise UserError(str(error).replace("train.global_batch", "proxy.batch")) from None


def run_config(config: ProxyJobConfig) -> RunConfig:
    """Returns one student's distillation as launch/distill.py would run it, with the uniform mapping: every model has
    one."""
    return RunConfig(
        output_dir=config.output_dir,
        seed=config.seed,
        deepspeed_config=deepspeed_file(config.deepspeed_config),
        require_fused=config.require_fused,
        allow_pickle=config.allow_pickle,
        teacher=config.teacher,
        student=config.student,
        loss=config.loss,
        data=config.data,
        optim=config.optim,
        train=config.train.as_train(config.proxy.steps, save_every=config.proxy.save_every),
        kernels=config.kernels,
    )


def deepspeed_file(given: str) -> str:
    """Returns the DeepSpeed file of the members. `auto` on a CPU is stage 0: there is nothing to shard in a small
    student, and each member of a cohort would pay for ZeRO's copies (docs/benchmarks.md, "Proxy cohorts")."""
    if given != "auto" or uses_gpu():
        return given
    return str(FOLDER / ("zero0_bf16.json" if has_fast_bf16() else "zero0_fp32.json"))


def parse_genomes(config: ProxyJobConfig, base: Plan) -> tuple[Genome, ...]:
    """Returns each mapping once, in the order given, and `none` behind them where the yardstick is yet to be measured.
    Raises UserError naming the genome that does not fit the models."""
    sizes = {"student_layers": base.student_shape.layers, "teacher_layers": base.teacher_shape.layers}
    genomes: dict[MappingPair, Genome] = {}
    for i, text in enumerate((*config.genomes, *(() if config.proxy.yardstick else ("none",)))):
        mapping = MappingPair.parse(text, **sizes, key="genomes")
        if mapping.kept is not None and config.student.path is not None:
            raise UserError(
                f"genomes='{mapping}': student.path={config.student.path!r} already has weights; leave out the part "
                "before the @, or remove student.path"
            )
        if mapping in genomes:
            continue
        pairs = {"hidden": mapping.hidden.pairs, "attention": mapping.attention.pairs}
        kinds = [*(LOSSES[name] for name in config.loss.active), *base.own_losses]
        learns = any(kind.mapped_by is None or pairs[kind.mapped_by] for kind in kinds)
        genomes[mapping] = Genome(
            mapping, text, i < len(config.genomes), with_mapping(base, mapping) if learns else None
        )
    return tuple(genomes.values())


def fingerprint_parts(config: ProxyJobConfig, base: Plan, tasks: Sequence[TaskData]) -> dict[str, Any]:
    """Returns every setting that decides a fitness, by section, hashes of what is read, and what this machine makes of
    both."""
    parts = given_parts(config)
    hashes = model_hashes("teacher", base.teacher)
    parts["teacher"] |= {key.partition(".")[2]: value for key, value in hashes.items()} | {"dtype": base.teacher_dtype}
    parts["data"] |= {"content_sha256": corpus_hash(base.manifest), "seq_len": base.seq_len}
    parts["train"] |= {"precision": base.execution.precision, "warmup_steps": base.config.train.resolved_warmup_steps}
    parts["tasks"] = {task.spec.name: {"sha256": task.sha256, "metrics": list(task.spec.metrics)} for task in tasks}
    return parts
