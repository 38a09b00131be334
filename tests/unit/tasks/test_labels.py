"""Rows without a gold label, spellings of labels, and what is said of rows before they are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_checks import check_error, config_of, rows_of

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.tasks.labels import label_meanings
from engine.tasks.load import TaskData, load_task
from engine.tasks.specs import BUILT_IN

RTE, SST2 = BUILT_IN["RTE"], BUILT_IN["SST-2"]


def config(folder: Path, written: list[Any], *, dev: list[Any] | None = None, **settings: Any) -> TaskDataConfig:
    """The task `mine` with a row for each of these labels."""
    for name, values in (("train", written), ("dev", written if dev is None else dev)):
        rows = [{"text": f"{name} {i}", "label": label} for i, label in enumerate(values)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unlabelled = settings.pop("unlabelled", "error")
    mine = CustomTaskConfig(train=str(folder / "train.jsonl"), dev=str(folder / "dev.jsonl"), **settings)
    return TaskDataConfig(custom={"mine": mine}, unlabelled=unlabelled)


def labels_of(data: TaskData, name: str = "train") -> list[str]:
    rows = rows_of(data, name)
    assert rows.labels is not None
    return [data.spec.labels[index] for index in rows.labels]


MARKS = ["-", "--", "?", "", " ", -1, "-1", "-1.0", -100, None, float("nan"), "nan", "NaN", "NA", "N/A", "null", "None",
         "hidden", "Unlabelled"]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS, ids=repr)
def test_rows_without_a_gold_label_are_counted_and_left_out_on_request(tmp_path: Path, mark: Any) -> None:
    labels = ["a", mark, "b", mark, "a"]
    words = ["train.jsonl:2: 2 of 5 rows have no gold label", f"({mark!r} 2)", "task.unlabelled=leave_out",
             "name all labels in task.custom.mine.labels"]  # fmt: skip
    check_error(words, lambda: load_task("mine", config(tmp_path, labels)))
    data = load_task("mine", config(tmp_path, labels, unlabelled="leave_out"))
    assert data.spec.labels == ("a", "b")
    for name in ("train", "dev"):
        assert rows_of(data, name).first == [f"{name} 0", f"{name} 2", f"{name} 4"]
        assert labels_of(data, name) == ["a", "b", "a"]
        assert any(f"{name}.jsonl: 2 of 5 rows" in text and "are left out" in text for text in data.warnings)


@pytest.mark.parametrize("mark", ["nan", "", None, "NA", "?"], ids=repr)
def test_regressions_have_rows_without_a_label_too(tmp_path: Path, mark: Any) -> None:
    check_error("1 of 3 rows", lambda: load_task("mine", config(tmp_path, [1.5, mark, -1], kind="regression")))
    data = load_task("mine", config(tmp_path, [1.5, mark, -1], kind="regression", unlabelled="leave_out"))
    assert rows_of(data, "train").labels.tolist() == [1.5, -1.0]  # type: ignore[union-attr]


def test_what_the_labels_name_is_a_label(tmp_path: Path) -> None:
    data = load_task("mine", config(tmp_path, [-1, 0, 1, -1], labels=["-1", "0", "1"]))
    assert labels_of(data) == ["-1", "0", "1", "-1"]
    data = load_task("mine", config(tmp_path, ["-1.0", "NA"], labels=["NA", "-1.0"]))
    assert labels_of(data) == ["-1.0", "NA"]


def test_a_split_without_any_label_is_no_dev_split(tmp_path: Path) -> None:
    given = config(tmp_path, ["a", "b"], dev=[-1, -1], unlabelled="leave_out")
    check_error(["dev.jsonl: 2 of 2 rows", "give labelled rows"], lambda: load_task("mine", given))


def test_official_tasks_leave_out_rows_without_a_gold_label(tmp_path: Path) -> None:
    (tmp_path / "STS-B").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "STS-B" / f"{name}.tsv").write_text(f"sentence1\tsentence2\tscore\n{name}\tb\t-1\nc\td\t2.5\n")
    words = ["train.tsv:2: 1 of 2 rows have no gold label ('-1' 1)", "task.unlabelled=leave_out"]
    check_error(words, lambda: load_task("stsb", config_of(tmp_path)))
    data = load_task("stsb", config_of(tmp_path, unlabelled="leave_out"))
    assert rows_of(data, "train").first == ["c"]
    (tmp_path / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t5.5\n")
    check_error(["dev.tsv:2: label '5.5' is not in 0 to 5"], lambda: load_task("stsb", config_of(tmp_path, **LEAVE)))


LEAVE = {"unlabelled": "leave_out"}
SPELLINGS = [("pos", "Pos"), ("not_entailment", "not entailment"), ("caf\u00e9", "cafe\u0301"), ("a", "\u200ba"),
             ("pos", '"pos"'), ("1", "01"), ("true", "1")]  # fmt: skip


@pytest.mark.parametrize("pair", SPELLINGS, ids=ascii)
def test_labels_that_differ_in_spelling_only_are_refused_unless_named(tmp_path: Path, pair: tuple[str, str]) -> None:
    labels = [*pair, pair[0], "other"]
    words = [repr(pair[0]) + " (2 rows)", repr(pair[1]) + " (1 rows)", "differ in spelling only", "mine.labels"]
    check_error(words, lambda: load_task("mine", config(tmp_path, labels)))
    assert load_task("mine", config(tmp_path, labels, labels=[*pair, "other"])).spec.labels == (*pair, "other")


def test_spaces_around_labels_are_not_read_and_numbers_are_numbers(tmp_path: Path) -> None:
    data = load_task("mine", config(tmp_path, ["pos", "pos ", "\u00a0neg"]))
    assert labels_of(data) == ["pos", "pos", "neg"]
    assert f"{tmp_path / 'train.jsonl'}: labels that are read without the spaces around them: 2" in data.warnings
    data = load_task("mine", config(tmp_path, [1, 1.0, "1", "0.0", "0"]))
    assert labels_of(data) == ["1", "1", "1", "0", "0"]
    check_error("unknown label 'True'", lambda: load_task("mine", config(tmp_path, [True, False], dev=["True"])))


def test_unknown_labels_are_counted(tmp_path: Path) -> None:
    given = config(tmp_path, ["neg", "pos"], dev=["pos", 0, 1])
    check_error(["dev.jsonl:2: unknown label '0'", "1 more rows have none of them"], lambda: load_task("mine", given))


REMARKS: list[tuple[list[Any], dict[str, Any], str]] = [
    (["a", "b"], {"dev": ["a", "a"]}, "dev.jsonl: every row has the label 'a'"),
    ([f"row {i}" for i in range(30)], {}, "train.jsonl: 30 labels for 30 rows; is that the column of the labels?"),
    ([2.5, 2.5], {"dev": [1, 2], "kind": "regression"}, "train.jsonl: every row has the label 2.5"),
    (["a", "b"], {"labels": ["a", "b", "c"]}, "train.jsonl: no row has the label 'c'"),
    ([-1, 1, -1, 3.5], {"kind": "regression"}, "train.jsonl: 2 rows have the label -1, the only negative one"),
]


@pytest.mark.parametrize(("written", "settings", "says"), REMARKS, ids=[says for _, _, says in REMARKS])
def test_remarks_on_labels(tmp_path: Path, written: list[Any], settings: dict[str, Any], says: str) -> None:
    warnings = load_task("mine", config(tmp_path, written, **settings)).warnings
    assert any(says in text for text in warnings), warnings


def test_dev_rows_that_are_in_training_and_empty_texts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\none  Map,a\n two,b\n,a\n")
    (tmp_path / "dev.csv").write_text("text,label\nONE map,b\nthree,a\n")
    mine = CustomTaskConfig(train=str(tmp_path / "train.csv"), dev=str(tmp_path / "dev.csv"))
    warnings = load_task("mine", TaskDataConfig(custom={"mine": mine})).warnings
    assert f"{tmp_path / 'train.csv'}: empty texts: 1" in warnings
    assert any("mine: 1 of 2 dev rows have the texts of a training row" in text for text in warnings)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["NOT_ENTAILMENT", "Entailment"], ("not_entailment", "entailment")),
        (["not entailment", "entailment"], ("not_entailment", "entailment")),
        (["yes", "no"], None),
        (["entailment", "entailment"], None),
        (["entailment", "not_entailment", "neutral"], None),
        (["entailment"], None),
    ],
)
def test_meanings_of_names(names: list[str], meant: tuple[str, ...] | None) -> None:
    assert label_meanings(names, RTE) == meant


def test_names_that_stand_for_0_and_1() -> None:
    assert label_meanings(["POSITIVE", "NEGATIVE"], SST2) == ("1", "0")
    assert label_meanings(["1", "0"], SST2) == ("1", "0")
    assert label_meanings(["LABEL_0", "LABEL_1"], SST2) is None
