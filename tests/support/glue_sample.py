"""All nine GLUE tasks in the layout of the official download, small, with labels that follow simple rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tiny_world import WORDS

TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 24, 8, 4
_MARKERS = ("not", "else", "much", "today")
_PLAIN = tuple(word for word in WORDS if word not in _MARKERS)
_PARSES = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")
_TEXTS = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String")
_LABELS = ("label", "Quality", "score", "is_duplicate", "gold_label", "label1")

Row = tuple[tuple[str, ...], str]
"""The texts and the label of a row."""


def write_glue_sample(folder: Path) -> None:
    """Writes folder/CoLA … folder/WNLI, each with train, dev and test files of TRAIN_ROWS, DEV_ROWS and TEST_ROWS."""
    pair = ("sentence1", "sentence2")
    stsb = ("genre", "filename", "year", "old_index", "source1", "source2")
    mnli = ("promptID", "pairID", "genre", *_PARSES)
    gold = [f"label{i}" for i in range(1, 6)]
    ids = ("#1 ID", "#2 ID", "#1 String", "#2 String")
    entailed = ("not_entailment", "entailment")
    _write(folder / "CoLA", _marked, train=("source", "label", "star", "sentence"), test=("index", "sentence"))
    _write(folder / "SST-2", _marked, train=("sentence", "label"), test=("index", "sentence"))
    _write(folder / "MRPC", _same, train=("Quality", *ids), test=("index", *ids), bom=True)
    _write(folder / "STS-B", _alike, train=("index", *stsb, *pair, "score"), test=("index", *stsb, *pair))
    question = ("question1", "question2")
    _write(folder / "QQP", _same, train=("id", "qid1", "qid2", *question, "is_duplicate"), test=("id", *question))
    for kind in ("matched", "mismatched"):
        _write(
            folder / "MNLI",
            _follows,
            train=("index", *mnli, *pair, "label1", "gold_label"),
            dev=("index", *mnli, *pair, *gold, "gold_label"),
            test=("index", *mnli, *pair),
            suffix=f"_{kind}",
        )
    for task, texts in {"QNLI": ("question", "sentence"), "RTE": pair}.items():
        _write(folder / task, _same, train=("index", *texts, "label"), test=("index", *texts), labels=entailed)
    _write(folder / "WNLI", _same, train=("index", *pair, "label"), test=("index", *pair))


def _write(
    folder: Path,
    make: Callable[[random.Random, int], Row],
    *,
    train: tuple[str, ...],
    test: tuple[str, ...],
    dev: tuple[str, ...] | None = None,
    labels: tuple[str, ...] = (),
    suffix: str = "",
    bom: bool = False,
) -> None:
    """Column names say what goes into them; `labels` renames the labels 0 and 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns, count in (
        ("train", train, TRAIN_ROWS),
        (f"dev{suffix}", dev or train, DEV_ROWS),
        (f"test{suffix}", test, TEST_ROWS),
    ):
        rng = random.Random(f"{folder.name} {name}")
        lines = [] if folder.name == "CoLA" and name != "test" else ["\t".join(columns)]
        for number in range(count):
            texts, label = make(rng, number)
            lines.append("\t".join(_cells(columns, number, texts, labels[int(label)] if labels else label)))
        start = "\ufeff" if bom else ""
        (folder / f"{name}.tsv").write_text(start + "\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _cells(columns: tuple[str, ...], number: int, texts: tuple[str, ...], label: str) -> list[str]:
    left = list(texts)
    cells = []
    for column in columns:
        if column in ("index", "id"):
            cells.append(str(number))
        elif column in _LABELS:
            cells.append(label)
        elif column in _TEXTS:
            cells.append(left.pop(0))
        else:
            cells.append("" if column == "star" else f"{column}-{number}")
    return cells


def _words(rng: random.Random) -> list[str]:
    return rng.sample(_PLAIN, k=rng.randint(3, 7))


def _marked(rng: random.Random, number: int) -> Row:
    """1 with the word much, 0 with the word not."""
    words = _words(rng)
    words.insert(rng.randint(0, len(words)), ("not", "much")[number % 2])
    return (" ".join(words),), str(number % 2)


def _same(rng: random.Random, number: int) -> Row:
    """1 when the second text has the words of the first, in another order; else all its words are others."""
    first = rng.sample(_PLAIN, k=4)
    others = [word for word in _PLAIN if word not in first]
    second = rng.sample(first if number % 2 else others, k=4)
    return (" ".join(first), " ".join(second)), str(number % 2)


def _alike(rng: random.Random, number: int) -> Row:
    """5 for the same words, 0 for others."""
    first = rng.sample(_PLAIN, k=5)
    others = [word for word in _PLAIN if word not in first]
    shared = number % 6
    second = first[:shared] + rng.sample(others, k=5 - shared)
    return (" ".join(first), " ".join(second)), f"{shared:.3f}"


def _follows(rng: random.Random, number: int) -> Row:
    """neutral with the word else, contradiction with the word not, otherwise entailment."""
    first = _words(rng)
    kind = number % 3
    second = [*rng.sample(first, k=3), *([], ["else"], ["not"])[kind]]
    return (" ".join(first), " ".join(second)), ("entailment", "neutral", "contradiction")[kind]
