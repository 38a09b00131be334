"""Descriptions of the tasks: GLUE, SQuAD and those of the user's own; their names in any spelling."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, replace
from typing import Literal

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.config.places import command
from engine.errors import UserError
from engine.tasks.spelling import is_label, label_text

Kind = Literal["classification", "regression", "span", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    epochs: float
    lr: float
    batch: int
    """Rows per optimizer step."""
    seq_len: int


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a file hold what."""

    first: str
    second: str | None = None
    label: str = "label"
    ids: tuple[str, ...] = ("index",)
    """Names of the column that identifies a row; the first one that the file has counts."""
    setting: str | None = None
    """The section that chose these names, like task.custom.mine; None: the task's official layout."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a GLUE task's texts and labels are."""

    config: str
    """Configuration of the hub's nyu-mll/glue."""
    first: str
    """Column of the files of the GLUE download."""
    second: str | None = None
    hub_texts: tuple[str, str] | None = None
    """The hub's names of both columns, where they differ."""
    label: str = "label"
    """Column of the files; the hub's is always `label`."""
    ids: str = "index"
    """Column of the files that identifies a row, where there is one; the hub's is always `idx`."""
    headerless: tuple[str, ...] = ()
    """Columns of train and dev files that have no header line (CoLA; its test file has one)."""
    classes: tuple[str, ...] = ()
    """What the hub, and published models, call the labels 0 and 1."""
    skip_short: bool = False
    """Leave out lines with too few columns, as the official reader does (QQP: questions with line breaks in them)."""

    @property
    def files(self) -> Columns:
        return Columns(first=self.first, second=self.second, label=self.label, ids=(self.ids,))

    @property
    def hub(self) -> Columns:
        first, second = self.hub_texts or (self.first, self.second)
        return Columns(first=first, second=second, ids=("idx",))


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    name: str
    kind: Kind
    labels: tuple[str, ...]
    """Labels by index, as the files write them; () for regressions and spans."""
    metrics: tuple[str, ...]
    """Names in engine.tasks.metrics and engine.tasks.retrieval."""
    dev_splits: tuple[str, ...] = ("dev",)
    test_splits: tuple[str, ...] = ("test",)
    pair: bool
    defaults: TaskDefaults
    every_layer: bool = False
    """Whether a probe reads the pooled states of all layers and not of the last alone: acceptability shows in lower
    ones (docs/proxy.md)."""
    similarity: bool = False
    """A regression of how alike two texts are, which a cosine can score without training."""
    trainable: bool = True
    """Whether a model can be fine-tuned on it."""
    glue: bool = False
    """Whether it counts in the GLUE average."""
    layout: Layout | None = None
    """None for SQuAD and custom tasks."""
    submission: tuple[str, ...] = ()
    """Name of the prediction file for each test split, and for the dev split in its place."""
    target_range: tuple[float, float] | None = None
    """Smallest and largest regression target that can occur; predictions are clipped to it."""

    @property
    def counted_metrics(self) -> tuple[str, ...]:
        """Metrics whose mean is the score; the others are reported beside it"""
        return {"span": ("f1",), "retrieval": ("ndcg@10",)}.get(self.kind, self.metrics)

    @property
    def is_zero_shot(self) -> bool:
        """Whether vectors of texts score it without training"""
        return self.similarity or self.kind == "retrieval"

    @property
    def label_names(self) -> tuple[str, ...]:
        """What data sets and models call the labels, by index, where the files have 0 and 1."""
        return self.labels if self.layout is None or not self.layout.classes else self.layout.classes


DIAGNOSTIC = "diagnostic"
"""GLUE's diagnostic set: pairs without labels on which the server wants the MNLI model's predictions, as AX."""
LARGE = TaskDefaults(epochs=3, lr=5e-5, batch=32, seq_len=128)
"""Tasks of 67,000 rows and more. Small students gain from a larger rate than BERT-base's 2e-5, and batches of 32 keep
their steps few; 128 tokens hold nearly every GLUE input."""
SMALL = TaskDefaults(epochs=8, lr=5e-5, batch=16, seq_len=128)
"""Tasks of 3,700 to 8,600 rows: 3 epochs would be too few steps for a head that starts at random."""
TINY = TaskDefaults(epochs=10, lr=5e-5, batch=16, seq_len=128)
"""RTE, 2,490 rows."""
WINOGRAD = TaskDefaults(epochs=5, lr=5e-5, batch=16, seq_len=128)
"""WNLI, 635 rows whose dev split contradicts them: longer training makes it worse than the majority label."""
SPAN = TaskDefaults(epochs=3, lr=5e-5, batch=16, seq_len=384)
"""SQuAD, as in BERT's run_squad.py but for the rate, which is the one DistilBERT-sized students take."""
CUSTOM = TaskDefaults(epochs=3, lr=5e-5, batch=16, seq_len=128)
RETRIEVAL = replace(CUSTOM, seq_len=256)
"""Documents are longer than sentences; it is never trained on."""
RETRIEVAL_METRICS = ("ndcg@10", "recall@10", "recall@100")

_ACCURACY, _ACCURACY_F1 = ("accuracy",), ("accuracy", "f1")
_LABELS_01, _ENTAILED = ("0", "1"), ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")


def _glue(
    name: str,
    layout: Layout,
    metrics: tuple[str, ...],
    defaults: TaskDefaults,
    *,
    labels: tuple[str, ...] = _LABELS_01,
) -> TaskSpec:
    return TaskSpec(
        name=name,
        kind="classification",
        labels=labels,
        metrics=metrics,
        pair=layout.second is not None,
        defaults=defaults,
        glue=True,
        layout=layout,
        submission=(f"{name}.tsv",),
    )


def _squad(name: str) -> TaskSpec:
    return TaskSpec(
        name=name, kind="span", labels=(), metrics=("exact_match", "f1"), test_splits=(), pair=True, defaults=SPAN
    )


_COLA = Layout(
    config="cola",
    first="sentence",
    headerless=("source", "label", "star", "sentence"),
    classes=("unacceptable", "acceptable"),
)
_SST2 = Layout(config="sst2", first="sentence", classes=("negative", "positive"))
_MRPC = Layout(
    config="mrpc",
    first="#1 String",
    second="#2 String",
    hub_texts=_SENTENCES,
    label="Quality",
    classes=("not_equivalent", "equivalent"),
)
_STSB = Layout(config="stsb", first="sentence1", second="sentence2", label="score")
_QQP = Layout(
    config="qqp",
    first="question1",
    second="question2",
    label="is_duplicate",
    ids="id",
    classes=("not_duplicate", "duplicate"),
    skip_short=True,
)
_MNLI = Layout(
    config="mnli", first="sentence1", second="sentence2", hub_texts=("premise", "hypothesis"), label="gold_label"
)
_QNLI = Layout(config="qnli", first="question", second="sentence")
_RTE = Layout(config="rte", first="sentence1", second="sentence2")
_WNLI = Layout(config="wnli", first="sentence1", second="sentence2", classes=("not_entailment", "entailment"))

_SPECS = (
    replace(_glue("CoLA", _COLA, ("matthews",), SMALL), every_layer=True),
    _glue("SST-2", _SST2, _ACCURACY, LARGE),
    _glue("MRPC", _MRPC, _ACCURACY_F1, SMALL),
    replace(
        _glue("STS-B", _STSB, ("pearson", "spearman"), SMALL, labels=()),
        kind="regression",
        similarity=True,
        target_range=(0.0, 5.0),
    ),
    _glue("QQP", _QQP, _ACCURACY_F1, LARGE),
    replace(
        _glue("MNLI", _MNLI, _ACCURACY, LARGE, labels=("entailment", "neutral", "contradiction")),
        dev_splits=("dev_matched", "dev_mismatched"),
        test_splits=("test_matched", "test_mismatched", DIAGNOSTIC),
        submission=("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"),
    ),
    _glue("QNLI", _QNLI, _ACCURACY, LARGE, labels=_ENTAILED),
    _glue("RTE", _RTE, _ACCURACY, TINY, labels=_ENTAILED),
    _glue("WNLI", _WNLI, _ACCURACY, WINOGRAD),
    _squad("SQuAD-v1.1"),
    _squad("SQuAD-v2"),
)

BUILT_IN = {spec.name: spec for spec in _SPECS}
"""Every task with an official layout, by its official spelling."""

GLUE_TASKS: tuple[str, ...] = tuple(name for name, spec in BUILT_IN.items() if spec.glue)

_SQUAD_SPELLINGS = {"squad": "SQuAD-v1.1", "squadv1": "SQuAD-v1.1", "squad11": "SQuAD-v1.1"} | dict.fromkeys(
    ("squad2", "squad20", "squadv20"), "SQuAD-v2"
)


def plain_name(name: str) -> str:
    """Returns a name as names are compared: without case and punctuation."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


_SPELLINGS = {plain_name(name): name for name in BUILT_IN} | _SQUAD_SPELLINGS


def task_spec(name: str, config: TaskDataConfig) -> TaskSpec:
    """Returns the task of this name in any spelling. Raises UserError with the nearest name when there is none.

    A custom classification without `labels` has none here: load_task finds them in its training rows, and the spec of
    its result is the final one.
    """
    check_custom_names(config)
    if name in config.custom:
        return _custom_spec(name, config.custom[name])
    key = plain_name(name)
    if key in _SPELLINGS:
        return BUILT_IN[_SPELLINGS[key]]
    custom = {plain_name(own): own for own in config.custom}
    if key in custom:
        return _custom_spec(custom[key], config.custom[custom[key]])
    spellings = {"glue": "glue"} | _SPELLINGS | custom
    near = difflib.get_close_matches(key, spellings, n=1)
    hint = f", did you mean {spellings[near[0]]!r}?" if near else ""
    valid = ", ".join(["glue", *BUILT_IN, *config.custom])
    raise UserError(
        f"task {name!r}: there is no such task{hint} (tasks: {valid}); correct it, or describe it in task.custom"
    )


def official_name(folder: str) -> str | None:
    """Returns the built-in task that a folder's name means; None: none."""
    return _SPELLINGS.get(plain_name(folder))


def check_custom_names(config: TaskDataConfig) -> None:
    """Raises UserError for a custom name that is another task's, or cannot name a file."""
    seen = {**_SPELLINGS, "glue": "glue"}
    for name in config.custom:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"task.custom.{name}: names a file; use letters, digits, -, _ and . only, a letter first")
        if plain_name(name) in seen:
            raise UserError(
                f"task.custom.{name}: is also how {seen[plain_name(name)]!r} is spelled; choose another name"
            )
        seen[plain_name(name)] = name


def _custom_spec(name: str, custom: CustomTaskConfig) -> TaskSpec:
    key = f"task.custom.{name}"
    if custom.kind == "retrieval":
        return _retrieval_spec(name, custom)
    classifies = custom.kind == "classification"
    if custom.folder is not None:
        raise UserError(f"{key}.folder={custom.folder!r}: is for a retrieval; write kind: retrieval, or remove it")
    if custom.dev is None:
        raise UserError(f"{key}.dev: name the file of the rows that score")
    if custom.train is None and (classifies or custom.text_pair is None):
        raise UserError(f"{key}.train: name the file of the training rows; only a regression of pairs needs none")
    columns = [name for name in (custom.text, custom.text_pair, custom.label) if name is not None]
    if len(set(columns)) < len(columns):
        raise UserError(f"{key}: text, text_pair and label name {', '.join(columns)}; each needs a column of its own")
    if custom.labels is not None:
        if not classifies:
            raise UserError(f"{key}.labels={custom.labels!r}: remove it: a regression has none")
        if len({label_text(label) for label in custom.labels}) < len(custom.labels) or len(custom.labels) < 2:
            raise UserError(f"{key}.labels={custom.labels!r}: list two or more labels, each once")
        for label in custom.labels:
            if not is_label(label):
                raise UserError(
                    f"{key}.labels={custom.labels!r}: {label!r} is empty, has spaces around it, a tab or a line "
                    "break; rename it"
                )
    usual = ["accuracy"] if classifies else ["pearson", "spearman"]
    possible = ["accuracy", "f1", "matthews"] if classifies else usual
    metrics = usual if custom.metrics is None else list(dict.fromkeys(custom.metrics))
    if not metrics or not set(metrics) <= set(possible):
        raise UserError(f"{key}.metrics={custom.metrics!r}: a {custom.kind} takes one or more of {', '.join(possible)}")
    return TaskSpec(
        name=name,
        kind=custom.kind,
        labels=tuple(custom.labels or ()),
        metrics=tuple(metrics),
        test_splits=("test",) if custom.test is not None else (),
        pair=custom.text_pair is not None,
        defaults=CUSTOM,
        similarity=not classifies and custom.text_pair is not None,
        trainable=custom.train is not None,
        submission=(f"{name}.tsv",),
    )


def _retrieval_spec(name: str, custom: CustomTaskConfig) -> TaskSpec:
    key = f"task.custom.{name}"
    if custom.folder is None:
        raise UserError(f"{key}.folder: name the folder with corpus.jsonl, queries.jsonl and qrels")
    for setting in fields(custom):
        value = getattr(custom, setting.name)
        if setting.name not in ("folder", "kind") and value != setting.default:
            raise UserError(f"{key}.{setting.name}={value!r}: has no effect on a retrieval; remove it")
    return TaskSpec(
        name=name,
        kind="retrieval",
        labels=(),
        metrics=RETRIEVAL_METRICS,
        test_splits=(),
        pair=False,
        defaults=RETRIEVAL,
        trainable=False,
    )


def require_trainable(spec: TaskSpec, setting: str) -> None:
    """Raises UserError, which names the setting that wants it, for a task that no model can be fine-tuned on."""
    if not spec.trainable:
        raise UserError(
            f"{setting}: {spec.name!r} has nothing to train on; `{command('score')}`, and proxies with "
            "proxy.evaluator=probe, score it without training"
        )
