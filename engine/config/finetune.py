"""What a fine-tuning computes: frozen dataclasses beside those of engine/config/distill.py. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.checks import require
from engine.config.distill import (
    KernelConfig,
    LossConfig,
    MappingConfig,
    OptimConfig,
    Schedule,
    decay_share_of,
    require_decay,
)
from engine.config.marks import PathText, evaluation, how, located, result
from engine.mapping import RANDOM_EACH_STEP

GRID_KEYS = ("lr", "epochs", "batch")
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class CustomTaskConfig:
    train: PathText | None = None
    """File of the training rows, with named columns: .csv, .tsv, JSON lines, a JSON list or Parquet. A regression of
    pairs can do without: it is scored by cosine, without training."""

    dev: PathText | None = None
    """File of the rows that score."""

    test: PathText | None = None
    """File of rows to predict; needs no label column."""

    folder: PathText | None = None
    """Folder of a retrieval in BEIR's layout: corpus.jsonl, queries.jsonl, and train.tsv, dev.tsv or test.tsv in its
    folder qrels. It takes the place of files and columns."""

    text: str = "text"
    """Column of the (first) text."""

    text_pair: str | None = None
    """Column of the second text; unset: single texts."""

    label: str = "label"
    """Column of the label: a name (classification) or a number (regression)."""

    kind: Literal["classification", "regression", "retrieval"] = "classification"
    """What the label is: a class, or a number; with two texts, the number says how alike they are. retrieval: a search
    for documents, with the files of `folder`."""

    labels: list[str] | None = None
    """Every label of a classification, in the order of their indices; unset: those of the training rows, sorted. Every
    text in this list is a label, even -1 or NA."""

    metrics: list[Literal["accuracy", "f1", "matthews", "pearson", "spearman"]] | None = None
    """Scores; the task's score is their mean. Unset: accuracy, or pearson and spearman for a regression."""


@dataclass(frozen=True, kw_only=True)
class TaskDataConfig:
    """Where the rows of tasks are, and how many of them are read."""

    data_dir: PathText | None = located(None)
    """Folder with tasks in their official layout (SST-2/train.tsv, SQuAD/train-v1.1.json …); unset: the hub."""

    custom: dict[str, CustomTaskConfig] = located(factory=dict)
    """Tasks of your own by name: files and columns."""

    train_rows: int | None = located(None)
    """Largest number of training rows of a task, drawn at random once (the same rows for every seed); unset: all."""

    dev_rows: int | None = located(None)
    """Largest number of rows that are scored, from the front of the file; unset: all."""

    unlabelled: Literal["error", "leave_out"] = located("error")
    """Rows without a gold label (-, -1, nan, nothing …) in training and dev files, and training questions of SQuAD
    whose answer is not at its answer_start. error: stop with their number; leave_out: go on without them, with a
    warning."""

    def __post_init__(self) -> None:
        for name in ("train_rows", "dev_rows"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"task.{name}", value, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TaskDataConfig):
    """Tasks and their rows, and how a model is fine-tuned on them."""

    name: str | list[str] = located("SST-2")
    """Task, list of tasks, or `glue` for all nine (those that are missing under data_dir are named and left out)."""

    seeds: list[int] = evaluation(factory=lambda: [0])
    """One fine-tuning for each seed, of head, order of the rows and dropout. Scores are means over them."""

    epochs: float | None = result(None)
    """Passes over the training rows; unset: by task (docs/tasks.md)."""

    lr: float | None = result(None)
    """Peak learning rate; unset: by task."""

    batch: int | None = result(None)
    """Rows per optimizer step over all ranks; unset: by task."""

    seq_len: int | None = result(None)
    """Longest input in tokens, longer ones are cut; unset: by task, and never more than the model takes."""

    doc_stride: int = result(128)
    """SQuAD: tokens between the beginnings of two windows of one text."""

    grid: dict[str, list[float]] = result(factory=dict)
    """Values to try of lr, epochs and batch, like `{lr: [2e-5, 5e-5], batch: [16, 32]}`: every combination is trained
    with every seed, and the one with the best mean dev score is reported."""

    warmup_share: float = result(0.1)
    """Share of the optimizer steps with linear warm-up."""

    dropout: float = result(0.1)
    """Dropout of the encoder and the head while it is fine-tuned."""

    patience: int | None = result(None)
    """Early stopping: end after this many evaluations without a better dev score, and keep the best weights. Unset:
    train all epochs and keep the last."""

    eval_every: int | None = result(None)
    """Optimizer steps between evaluations; unset: once per epoch."""

    predict: bool = how(False)
    """Write predictions for dev and test files in the GLUE submission layout, under `predictions/`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.names), "task.name", self.name, "name at least one task")
        require(bool(self.seeds), "task.seeds", self.seeds, "give at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "task.seeds", self.seeds, "each seed once")
        require(min(self.seeds, default=0) >= 0, "task.seeds", self.seeds, "seeds must be >= 0")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            require(value is None or value > 0, f"task.{name}", value, "must be > 0")
        for name in ("batch", "patience", "eval_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"task.{name}", value, "must be at least 1")
        require(self.seq_len is None or self.seq_len >= 8, "task.seq_len", self.seq_len, "must be at least 8 tokens")
        require(self.doc_stride >= 1, "task.doc_stride", self.doc_stride, "must be at least 1")
        require(0.0 <= self.warmup_share <= 1.0, "task.warmup_share", self.warmup_share, "must be in [0, 1]")
        require(0.0 <= self.dropout < 1.0, "task.dropout", self.dropout, "must be in [0, 1)")
        for key, values in self.grid.items():
            require(key in GRID_KEYS, "task.grid", key, f"only {', '.join(GRID_KEYS)} can be searched")
            require(bool(values) and min(values) > 0, f"task.grid.{key}", values, "give at least one value > 0")
            require(
                key not in GRID_KEYS or getattr(self, key) is None,
                f"task.{key}",
                getattr(self, key, None),
                f"remove it: task.grid already sets {key}",
            )
        for value in self.grid.get("batch", ()):
            require(value == int(value), "task.grid.batch", value, "must be a whole number")

    @property
    def names(self) -> list[str]:
        """Names of the tasks as written, each once: a list, or text with commas."""
        given = self.name.split(",") if isinstance(self.name, str) else self.name
        return list(dict.fromkeys(name.strip() for name in given if name.strip()))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is fine-tuned."""

    path: PathText = located("runs/quickstart")
    """What to fine-tune: a student folder, a run directory of launch/distill.py (its `student/`), or any Hugging Face
    encoder by folder or hub name."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = how("auto")
    """Attention backend; auto picks by device, dtype, length and head width from a measured table."""

    activation_checkpointing: bool = how(False)
    """Recompute each layer's activations in the backward pass: less memory, about a third more compute."""


@dataclass(frozen=True, kw_only=True)
class TaskTeacherConfig:
    """A teacher that was fine-tuned on the task, for distillation on its rows."""

    path: PathText | None = located(None)
    """Folder of a teacher that was fine-tuned on the same task, for task-stage distillation; unset: none. `{task}` in
    it stands for the task's name, as in runs/teacher/{task}/model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = result("auto")
    """Precision of the teacher's weights and forward; auto follows the student's (ds_configs)."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = how("auto")
    """Attention backend; auto picks by device, dtype, length and head width from a measured table."""


@dataclass(frozen=True, kw_only=True)
class TaskLossConfig(LossConfig):
    """The loss of the labels and, with a teacher, what is compared with it."""

    labels: float = result(1.0)
    """Weight of the task's own loss: cross-entropy of the labels or spans, squared error of a regression."""

    logits: float = result(1.0)
    """Weight of the KL to the teacher's task logits at `temperature` (squared error for a regression); only with
    teacher.path."""

    hidden: float = result(0.0)
    """Weight of the hidden-state MSE on the task's text; only with teacher.path, as all losses below."""

    attention: float = result(0.0)
    """Weight of the MSE of attention scores on the task's text; needs equal head counts."""

    embedding: float = result(0.0)
    """Weight of the MSE of the embedding outputs on the task's text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.labels >= 0, "loss.labels", self.labels, "a loss weight must be >= 0")
        require(self.mlm == 0, "loss.mlm", self.mlm, "remove it: task texts are not masked")
        require(self.preset == "clean", "loss.preset", self.preset, "remove it: task losses have the clean form only")


@dataclass(frozen=True, kw_only=True)
class FineTrainConfig:
    """Schedule and clipping, and how often a fine-tuning logs and saves."""

    schedule: Schedule = result("linear")
    """Learning rate after the warm-up: to 0 at the last step linearly or by a half cosine, constant, or constant with a
    linear decay to 0 at the end (warmup_stable_decay)."""

    decay_share: float | None = result(None)
    """Share of the steps that the decay of warmup_stable_decay takes; unset: 0.2. Not with other schedules."""

    grad_clip: float = result(1.0)
    """Largest global gradient norm; 0: no clipping."""

    log_every: int = how(50)
    """Optimizer steps between step records, TensorBoard points and progress updates."""

    save_every: int = how(0)
    """Optimizer steps between checkpoints; 0: at the end of each fine-tuning (with patience: at each better score)."""

    def __post_init__(self) -> None:
        require_decay(self.schedule, self.decay_share)
        require(self.log_every >= 1, "train.log_every", self.log_every, "must be at least 1")
        for name in ("grad_clip", "save_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be >= 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    output_dir: PathText = how("runs/finetune")
    """Folder of all fine-tunings of this command; the same command again continues where it stopped."""

    resume: Literal["auto", "never"] = how("auto")
    """auto: keep finished fine-tunings and continue the unfinished one; never: refuse a folder that has any."""

    deepspeed_config: PathText = how("auto")
    """DeepSpeed JSON (see ds_configs/README.md); auto as in launch/distill.py."""

    dry_run: bool = how(False)
    """Stop after the start-up banner."""

    require_fused: bool = how(False)
    """Make a fallback to a slower optimizer or kernel an error."""

    allow_pickle: bool = how(False)
    """Accept weights in pytorch_model.bin, a pickle, of which only tensors are read. false: safetensors only."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    teacher: TaskTeacherConfig = field(default_factory=TaskTeacherConfig)
    mapping: MappingConfig = field(default_factory=MappingConfig)
    loss: TaskLossConfig = field(default_factory=TaskLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    train: FineTrainConfig = field(default_factory=FineTrainConfig)

    def __post_init__(self) -> None:
        require(
            self.mapping.hidden != RANDOM_EACH_STEP,
            "mapping.hidden",
            self.mapping.hidden,
            "only launch/distill.py draws layers; write a fixed mapping, e.g. uniform",
        )
        decay = decay_share_of(self.train.decay_share)
        require(
            self.train.schedule != "warmup_stable_decay" or self.task.warmup_share + decay <= 1.0,
            "task.warmup_share",
            self.task.warmup_share,
            f"with train.decay_share={decay:g} it must not exceed {1.0 - decay:g}",
        )
        if self.teacher.path is None:
            for name in self.loss.active:
                require(
                    name == "logits" or getattr(self.loss, name) == 0,
                    f"loss.{name}",
                    getattr(self.loss, name),
                    "needs a teacher: set teacher.path",
                )
            require(self.loss.labels > 0, "loss.labels", self.loss.labels, "must be > 0 without a teacher")
