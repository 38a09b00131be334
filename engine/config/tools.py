"""What the scripts beside training take: preparing a corpus, exporting, measuring, scoring, checking hosts. No torch
here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from engine.config.checks import require
from engine.config.finetune import TaskDataConfig
from engine.config.marks import PathText, how, located, result

BATCH_SIZES = (1, 32)
"""Sequences in a forward pass, of one who asks and of a service, at which speed is measured."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: PathText
    """File of text, JSON lines, CSV, TSV or Parquet (also compressed), a folder of these, a cloned data set repository,
    a folder saved by `datasets`, or a hub data set name."""

    weight: float = 1.0
    """Passes over this source an epoch: 2 shows each sequence twice, 0.5 half of them (the other half next time)."""

    field: str | None = None
    """Column or key that holds the text; unset: text. An error for files of plain text, which have none."""

    split: str | None = None
    """Split of a data set, or of a folder whose names tell splits; unset: train. An error where there are no splits."""

    name: str | None = None
    """Configuration name of a hub data set, or of a cloned one whose README.md declares configurations."""

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, "sources.weight", self.weight, "must be > 0 and finite")

    @property
    def column(self) -> str:
        return "text" if self.field is None else self.field

    @property
    def wanted_split(self) -> str:
        return "train" if self.split is None else self.split

    def refuse_unused(self, place: object, *names: str) -> None:
        """Raises UserError where one of the settings is set, which have no effect on `place`."""
        for name in names:
            require(
                getattr(self, name) is None,
                f"sources.{name}",
                getattr(self, name),
                f"has no effect on {place}; remove it",
            )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    sources: list[SourceConfig] = located(factory=list)
    """Where the text comes from."""

    output_dir: PathText = how("data/corpus")
    """Folder for the shards and manifest.json."""

    tokenizer: PathText = located("models/all-MiniLM-L6-v2")
    """Folder or hub name of the tokenizer: the teacher's, which may be a model of sentence-transformers."""

    seq_len: int = result(128)
    """Tokens per sequence, special tokens included."""

    pack: Literal["contiguous", "document", "unit"] = result("contiguous")
    """contiguous: a sequence goes on with the next document, after a separator; document: it ends with the document;
    unit: each sentence or paragraph (`unit`) is a sequence of its own, cut where it is longer, as sentence encoders
    read texts."""

    unit: Literal["sentence", "paragraph", "token"] = result("sentence")
    """What is never cut (unless longer than a whole sequence): sentences or paragraphs; token: cut anywhere, so that
    contiguous sequences are full."""

    short_seq_prob: float = result(0.0)
    """Share of sequences that aim at a random shorter length, not below min_tokens (BERT's pre-training: 0.1)."""

    min_tokens: int | None = result(None)
    """Sequences with fewer text tokens are dropped; unset: 8, with pack=unit 1, so that short texts are kept."""

    shard_mb: int = how(4)
    """Text per shard, in MB: the unit of parallel work, of restart, and of memory."""

    workers: int | None = how(None)
    """Processes that tokenise; unset: one per core."""

    on_bad_line: Literal["error", "skip"] = how("error")
    """What to do with a line or row that is not UTF-8, not JSON, incomplete, too long, or without the field: stop and
    name it, or skip and count it."""

    seed: int = result(0)
    """Seed of the short sequences."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 8, "seq_len", self.seq_len, "must be at least 8 tokens")
        require(0.0 <= self.short_seq_prob <= 1.0, "short_seq_prob", self.short_seq_prob, "must be in [0, 1]")
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "must be at least 1")
        if self.pack == "unit":
            require(self.unit != "token", "unit", self.unit, "with pack=unit write sentence or paragraph")
            require(not self.short_seq_prob, "short_seq_prob", self.short_seq_prob, "has no effect with pack=unit")
        require(self.least_tokens >= 1, "min_tokens", self.min_tokens, "must be at least 1")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1")

    @property
    def least_tokens(self) -> int:
        """Text tokens of the shortest sequence that is kept."""
        if self.min_tokens is None:
            return 1 if self.pack == "unit" else 8
        return self.min_tokens


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    run: PathText
    """Run directory that launch/distill.py wrote."""

    output_dir: PathText | None = None
    """Folder to write; unset: `student` inside the run directory."""

    tag: str = "newest"
    """Which checkpoint, like step-00000100; newest: the newest complete one."""

    format: Literal["transformers", "onnx"] = "transformers"
    """transformers: a Hugging Face folder; onnx: the same with onnx/model.onnx, whose outputs are compared with
    PyTorch's (needs mapdistill[onnx])."""

    push_to_hub: str | None = None
    """OWNER/NAME of a repository on the Hugging Face hub to upload the folder to; a new one is private."""

    dry_run: bool = False
    """With push_to_hub: write the folder and print what would be uploaded, without network."""

    def __post_init__(self) -> None:
        require(
            not self.dry_run or self.push_to_hub is not None,
            "dry_run",
            self.dry_run,
            "has no effect without push_to_hub; remove it",
        )
        if self.push_to_hub is not None:
            require(
                re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub, re.ASCII) is not None,
                "push_to_hub",
                self.push_to_hub,
                "must be OWNER/NAME, like ada/small-encoder",
            )


def _require_models(models: list[PathText]) -> None:
    require(bool(models), "models", models, "name at least one model")
    twice = sorted({path for path in models if models.count(path) > 1})
    require(not twice, "models", ", ".join(twice), "occurs twice; name each model once")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    models: list[PathText]
    """Encoders to measure: folders, hub names, or run directories. The others are compared with the first; a single
    student of launch/distill.py is compared with its teacher."""

    batch_sizes: list[int] = field(default_factory=lambda: list(BATCH_SIZES))
    """Sequences in a forward pass."""

    seq_len: int | None = None
    """Tokens of each sequence; unset: as in the run's corpus, else 128, but no more than all models take."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and computation."""

    rounds: int = 10
    """Timed forward passes of each model and batch size, of which the median counts."""

    allow_pickle: bool = False
    """Accept weights in pytorch_model.bin, a pickle, of which only tensors are read."""

    def __post_init__(self) -> None:
        _require_models(self.models)
        require(
            bool(self.batch_sizes) and min(self.batch_sizes) >= 1,
            "batch_sizes",
            self.batch_sizes,
            "must be whole numbers of at least 1",
        )
        require(self.seq_len is None or self.seq_len >= 1, "seq_len", self.seq_len, "must be at least 1 token")
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    models: list[PathText]
    """Encoders to score: folders, hub names, or run directories. The others are compared with the first; a single
    student of launch/distill.py is compared with its teacher."""

    tasks: list[str] = field(default_factory=lambda: ["STS-B"])
    """Tasks: similarities and retrievals are scored by cosine, without training, other tasks by a probe on frozen
    features."""

    seq_len: int | None = None
    """Tokens to which longer texts are cut; unset: by task, and never more than a model takes."""

    allow_pickle: bool = False
    """Accept weights in pytorch_model.bin, a pickle, of which only tensors are read."""

    task: TaskDataConfig = field(default_factory=TaskDataConfig)

    def __post_init__(self) -> None:
        _require_models(self.models)
        require(bool(self.tasks), "tasks", self.tasks, "name at least one task")
        require(self.seq_len is None or self.seq_len >= 8, "seq_len", self.seq_len, "must be at least 8 tokens")


@dataclass(frozen=True, kw_only=True)
class HostCheckConfig:
    hostfile: PathText
    """DeepSpeed hostfile (`worker-1 slots=8`) of the hosts to check."""

    shared: PathText | None = None
    """Folder that all hosts should share (where runs are written); a file that the first host writes there must appear
    on the others. Unset: not checked."""

    master_port: int = 29500
    """Port on the first host where the ranks will meet, as in `deepspeed --master_port`."""

    ssh_port: int | None = None
    """Port of the hosts' ssh servers; unset: as in ssh's own configuration."""

    seconds: float = 50.0
    """Time limit of the whole check."""

    json: bool = False
    """Print one JSON object in place of the table."""

    def __post_init__(self) -> None:
        require(0 < self.master_port < 65536, "master_port", self.master_port, "must be in 1..65535")
        require(self.ssh_port is None or 0 < self.ssh_port < 65536, "ssh_port", self.ssh_port, "must be in 1..65535")
        require(self.seconds >= 5, "seconds", self.seconds, "must be at least 5")
        if self.shared is not None:
            require(self.shared.startswith("/"), "shared", self.shared, "must be an absolute path")
