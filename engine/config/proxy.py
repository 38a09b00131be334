"""What proxy jobs compute: frozen dataclasses beside those of engine/config/distill.py. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.checks import require
from engine.config.distill import (
    DataConfig,
    KernelConfig,
    LossConfig,
    OptimConfig,
    Schedule,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from engine.config.finetune import TaskDataConfig
from engine.config.marks import PathText, evaluation, how, located, result
from engine.records.yardstick import TaskScale

PROXY_INIT = "uniform"
WARMUP_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """Length of the proxy distillations, and how their students are scored."""

    steps: int = result(240)
    """Optimizer steps of each student's distillation (docs/proxy.md says why so few)."""

    tasks: list[str] = located(factory=lambda: ["SST-2", "MRPC", "STS-B"])
    """Tasks whose scores make up a student's fitness."""

    other_tasks: list[str] = evaluation(factory=list)
    """Further tasks that are scored but never count (a search scores them only in its confirmation)."""

    yardstick: dict[str, TaskScale] = evaluation(factory=dict)
    """Task -> `start`, `teacher` and `weight`: the fitness is the weighted mean over tasks of the share of the gap
    between the untrained student's score (`start`) and the teacher's that a student closes. Empty: a proxy job scores
    both itself, distils `none` too, and gives equal weight to all tasks on which the teacher is better; a search
    measures the weights once, by the reliability of tasks."""

    evaluator: Literal["probe", "finetune"] = result("probe")
    """probe: frozen mean-pooled features (zero-shot cosine for similarity tasks, logistic and ridge regression
    elsewhere; deterministic); finetune: a short fine-tuning of a copy on each task."""

    folds: int = result(5)
    """Parts that a task's training rows are divided into. probe: each part is scored by a probe that was trained on the
    others (cross-validation); finetune: the last part is scored, the others are trained on. Dev rows are not used: they
    are for the final evaluation."""

    report_at: list[int] = evaluation(factory=list)
    """Steps after which students are scored too (records of kind step), so that a search can end some of them early."""

    stop_below: dict[int, float] = how(factory=dict)
    """Step of `report_at` -> fitness: a student whose intermediate fitness is lower ends there, without a result."""

    repeats: int = evaluation(1)
    """Runs of every genome, with seeds seed, seed + 1 …; two or more print the signal ratio."""

    epochs: float = result(2.0)
    """Passes over the task's training rows (evaluator finetune)."""

    lr: float = result(1e-4)
    """Peak learning rate (evaluator finetune)."""

    batch: int = result(32)
    """Rows per optimizer step (evaluator finetune)."""

    teacher_cache: PathText | None = how(None)
    """Folder for the teacher's tensors of each batch, for later jobs with the same batches (as all jobs of a search
    have); CPU only. Unset: none."""

    teacher_cache_gib: float = how(20.0)
    """Largest size of the cache for one teacher and one set of captured tensors; batches that do not fit are computed
    each time."""

    save_every: int = how(0)
    """Optimizer steps between checkpoints of each student, for long jobs, which the same command then continues; 0:
    none. With train.schedule=warmup_stable_decay the checkpoint before the decay is kept, and a later launch with more
    `steps` goes on from it. A student then has the whole vocabulary, which costs memory and time."""

    keep_students: bool = how(False)
    """Write each distilled student to `students/`."""

    layer_table: bool = how(False)
    """Print for each student, and for the untrained one, how much of every teacher layer a linear map of every student
    layer explains (docs/proxy.md, "Which layers know what"). Never part of the fitness."""

    def __post_init__(self) -> None:
        for name in ("steps", "repeats", "batch"):
            require(getattr(self, name) >= 1, f"proxy.{name}", getattr(self, name), "must be at least 1")
        require(self.folds >= 2, "proxy.folds", self.folds, "must be at least 2: one part is held out")
        require(bool(self.tasks), "proxy.tasks", self.tasks, "name at least one task")
        for task, scale in self.yardstick.items():
            key = f"proxy.yardstick.{task}"
            require(scale.weight >= 0, key, scale.weight, "the weight must be >= 0")
            require(
                not scale.weight or scale.teacher > scale.start,
                key,
                scale.teacher,
                f"the teacher's score must be above start={scale.start} in a task that counts; set its weight to 0",
            )
        require(self.save_every >= 0, "proxy.save_every", self.save_every, "must be >= 0")
        for name in ("epochs", "lr", "teacher_cache_gib"):
            require(getattr(self, name) > 0, f"proxy.{name}", getattr(self, name), "must be > 0")
        for step in self.report_at:
            require(
                1 <= step < self.steps, "proxy.report_at", step, f"must be in 1..{self.steps - 1} (proxy.steps - 1)"
            )
        for step in self.stop_below:
            require(step in self.report_at, "proxy.stop_below", step, f"must be one of report_at={self.report_at}")


@dataclass(frozen=True, kw_only=True)
class ProxyStudentConfig(StudentConfig):
    """The students' shape, and what they start from (init: uniform when unset)."""

    def __post_init__(self) -> None:
        # the default of `init` must not stand in the way of `path`
        if self.path is not None and self.init == PROXY_INIT:
            object.__setattr__(self, "init", None)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ProxyTrainConfig:
    """Batch and learning rate of the proxy distillations."""

    global_batch: int = result(16)
    """Sequences per optimizer step over all ranks."""

    lr: float = result(1e-3)
    """Peak learning rate."""

    warmup_steps: int | None = result(None)
    """Optimizer steps of linear warm-up from 0; unset: a third of `proxy.steps`."""

    schedule: Schedule = result("linear")
    """Learning rate after the warm-up: to 0 at `proxy.steps` linearly or by a half cosine, constant, or constant with a
    linear decay to 0 at the end (warmup_stable_decay): proxies of different `proxy.steps` and equal `warmup_steps` are
    then identical up to their decays."""

    decay_share: float | None = result(None)
    """Share of `proxy.steps` that the decay of warmup_stable_decay takes; unset: 0.2. Not with other schedules."""

    grad_clip: float = result(1.0)
    """Largest global gradient norm; 0: no clipping."""

    log_every: int = how(20)
    """Optimizer steps between step records and TensorBoard points."""

    def as_train(self, steps: int, *, save_every: int = 0) -> TrainConfig:
        """Returns the same settings as a TrainConfig of `steps` steps, which checks the values."""
        return TrainConfig(
            steps=steps,
            global_batch=self.global_batch,
            lr=self.lr,
            warmup_steps=round(WARMUP_SHARE * steps) if self.warmup_steps is None else self.warmup_steps,
            schedule=self.schedule,
            decay_share=self.decay_share,
            grad_clip=self.grad_clip,
            log_every=min(self.log_every, steps),
            eval_every=0,
            save_every=save_every,
        )


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """What the jobs of a search have in common with one that is started by hand."""

    output_dir: PathText = how()
    """Folder of everything that is written."""

    seed: int = evaluation(0)
    """Seed of weights, data order and dropout, of the first repeat."""

    deepspeed_config: PathText = how("auto")
    """DeepSpeed JSON (see ds_configs/README.md); auto as in launch/distill.py, but ZeRO stage 0 on a CPU."""

    dry_run: bool = how(False)
    """Stop after the start-up banner."""

    require_fused: bool = how(False)
    """Make a fallback to a slower optimizer or kernel an error."""

    allow_pickle: bool = how(False)
    """Accept weights in pytorch_model.bin, a pickle, of which only tensors are read. false: safetensors only."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: ProxyStudentConfig = field(default_factory=lambda: ProxyStudentConfig(init=PROXY_INIT))
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(eval_sequences=0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    train: ProxyTrainConfig = field(default_factory=ProxyTrainConfig)
    task: TaskDataConfig = field(default_factory=lambda: TaskDataConfig(train_rows=2000))
    proxy: ProxyConfig = field(default_factory=ProxyConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")
        require(
            self.data.eval_sequences == 0,
            "data.eval_sequences",
            self.data.eval_sequences,
            "remove it: a proxy is scored on tasks",
        )
        if self.proxy.steps >= 1:
            self.train.as_train(self.proxy.steps)


@dataclass(frozen=True, kw_only=True)
class ProxyJobConfig(ProxySettings):
    output_dir: PathText = how("runs/proxy")
    """Folder for records.jsonl, TensorBoard and saved students; genomes with a result in it are not run again."""

    resume: Literal["auto", "never"] = how("auto")
    """auto: do not run a genome again if output_dir has its result with the same fingerprint and seed; never: run
    all."""

    genomes: list[str] = evaluation(factory=list)
    """Layer mappings to compare, like `0-5-0-10`, a preset, or HIDDEN/ATTENTION for two different ones; all of them are
    distilled side by side against one teacher pass. LAYERS@ before a mapping replaces student.init: the teacher layer
    that each student layer starts from, 0 = random, or `follow` (the layer that it learns from)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.genomes), "genomes", self.genomes, "name at least one layer mapping, e.g. --genomes uniform last"
        )
