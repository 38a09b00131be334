"""Tasks: their names, and GLUE's files as they are downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from glue_sample import DEV_ROWS, TEST_ROWS, TRAIN_ROWS, write_glue_sample
from launching import ROOT
from task_checks import check_error, config_of, rows_of
from tiny_world import WORDS

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.tasks.load import HELD_OUT, hold_out, load_task, resolve_names, seen_by_searches
from engine.tasks.specs import GLUE_TASKS, require_trainable, task_spec

GLUE = Path(os.environ.get("MAPDISTILL_GLUE", ROOT.parent / "shared/data/glue"))
OFFICIAL_ROWS = {
    "CoLA": (8551, 1043),
    "SST-2": (67349, 872),
    "MRPC": (3668, 408),
    "STS-B": (5749, 1500),
    "RTE": (2490, 277),
    "WNLI": (635, 71),
}
OFFICIAL_STARTS = {
    "CoLA": "The sailors rode the breeze clear of the rocks.",
    "SST-2": "it 's a charming and often affecting journey . ",
    "MRPC": "He said the foodservice pie business",
    "STS-B": "A man with a hard hat is dancing.",
    "RTE": "Dana Reeve, the widow of the actor",
    "WNLI": "The drain is clogged with hair.",
}


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue sample")
    write_glue_sample(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "official"),
    [
        ("SST-2", "SST-2"),
        ("sst2", "SST-2"),
        ("Sst_2", "SST-2"),
        ("mnli", "MNLI"),
        ("sts-b", "STS-B"),
        ("stsb", "STS-B"),
        ("squad", "SQuAD-v1.1"),
        ("SQuAD v1.1", "SQuAD-v1.1"),
        ("squad_v2", "SQuAD-v2"),
        ("SQuAD-v2.0", "SQuAD-v2"),
        ("my.task", "My_Task"),
    ],
)
def test_names_in_any_spelling(given: str, official: str) -> None:
    config = TaskDataConfig(custom={"My_Task": CustomTaskConfig(train="a.tsv", dev="b.tsv")})
    assert resolve_names([given, official], config) == ([official], [])
    assert task_spec(given, config).name == official


def test_glue_stands_for_the_nine(sample: Path, tmp_path: Path) -> None:
    assert len(GLUE_TASKS) == 9
    assert resolve_names(["rte", "GLUE"], config_of(sample)) == (["RTE", *(t for t in GLUE_TASKS if t != "RTE")], [])
    assert resolve_names(["glue"], TaskDataConfig()) == (list(GLUE_TASKS), [])
    for name in ("cola", "MRPC"):
        (tmp_path / name).mkdir()
    absent = [task for task in GLUE_TASKS if task not in ("CoLA", "MRPC")]
    assert resolve_names(["glue"], config_of(tmp_path)) == (["CoLA", "MRPC"], absent)
    asked = resolve_names(["glue", "qqp"], config_of(tmp_path))
    assert asked == (["CoLA", "MRPC", "QQP"], [task for task in absent if task != "QQP"])


def test_mistyped_names(tmp_path: Path) -> None:
    own = TaskDataConfig(custom={"reviews": CustomTaskConfig(train="a.tsv", dev="b.tsv")})
    check_error(["'sst3'", "did you mean 'SST-2'"], lambda: resolve_names(["sst3"], own))
    check_error(["did you mean 'reviews'"], lambda: resolve_names(["review"], own))
    check_error(["'zebra'", "MNLI", "SQuAD-v2", "reviews"], lambda: load_task("zebra", own))
    check_error(["no folder of a GLUE task", str(tmp_path)], lambda: resolve_names(["glue"], config_of(tmp_path)))
    missing = config_of(tmp_path / "gleu")
    (tmp_path / "glue").mkdir()
    check_error(
        ["task.data_dir=", "gleu", "did you mean 'glue'", "examples/finetune.yaml"],
        lambda: resolve_names(["glue"], missing),
    )
    check_error(["task.data_dir=", "did you mean 'glue'"], lambda: load_task("cola", missing))
    check_error(["no folder CoLA there", "it has: glue"], lambda: load_task("cola", config_of(tmp_path)))


@pytest.mark.parametrize("name", ["sst2", "Glue", "squad", "a/b", "", ".x", "a b", "x,y"])
def test_names_that_a_custom_task_cannot_have(name: str) -> None:
    config = TaskDataConfig(custom={name: CustomTaskConfig(train="a.tsv", dev="b.tsv")})
    check_error(f"task.custom.{name}:", lambda: resolve_names(["RTE"], config))
    check_error(f"task.custom.{name}:", lambda: task_spec("RTE", config))


def test_two_custom_tasks_of_one_spelling() -> None:
    own = CustomTaskConfig(train="a.tsv", dev="b.tsv")
    check_error("task.custom.my_task", lambda: task_spec("RTE", TaskDataConfig(custom={"mytask": own, "my_task": own})))


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_sample_of_each_task(sample: Path, task: str) -> None:
    config = config_of(sample)
    data = load_task(task.lower(), config, test=True)
    spec = data.spec
    assert spec == task_spec(task, config)
    assert spec.name == task
    assert spec.glue
    assert not [text for text in data.warnings if "diagnostic" not in text]
    assert list(data.splits) == ["train", *spec.dev_splits, *(n for n in spec.test_splits if n != "diagnostic")]
    for name, split in data.splits.items():
        rows = rows_of(data, name)
        assert len(split) == {"t": TRAIN_ROWS, "d": DEV_ROWS}[name[0]] if "test" not in name else TEST_ROWS
        assert (rows.second is not None) == spec.pair
        assert set(" ".join([*rows.first, *(rows.second or [])]).split()) <= set(WORDS), "the tiny tokenizer knows them"
        assert rows.ids == [str(i) for i in range(len(split))]
        if "test" in name:
            assert rows.labels is None
        elif spec.kind == "regression":
            assert rows.labels is not None
            assert rows.labels.dtype == np.float32
            assert set(rows.labels) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
        else:
            assert rows.labels is not None
            assert rows.labels.dtype == np.int64
            assert set(rows.labels) == set(range(len(spec.labels)))
    assert list(load_task(task, config).splits) == ["train", *spec.dev_splits]


def test_labels_and_texts_belong_together(sample: Path) -> None:
    mnli = rows_of(load_task("mnli", config_of(sample)), "dev_mismatched")
    assert mnli.second is not None
    assert mnli.labels is not None
    for text, label in zip(mnli.second, mnli.labels, strict=True):
        assert label == (1 if "else" in text else 2 if "not" in text else 0)
    rte = rows_of(load_task("rte", config_of(sample)), "train")
    assert rte.second is not None
    assert rte.labels is not None
    for first, second, label in zip(rte.first, rte.second, rte.labels, strict=True):
        assert label == int(set(first.split()) != set(second.split()))  # 0 = entailment


@pytest.mark.parametrize("task", OFFICIAL_ROWS)
def test_official_files(task: str) -> None:
    if not (GLUE / task / "train.tsv").is_file():
        pytest.skip(f"no {task} in {GLUE}; set MAPDISTILL_GLUE to a folder with the GLUE download")
    data = load_task(task, config_of(GLUE))
    train, dev = rows_of(data, "train"), rows_of(data, "dev")
    assert (len(train), len(dev)) == OFFICIAL_ROWS[task]
    assert dev.first[0].startswith(OFFICIAL_STARTS[task])
    assert not any("\t" in text for text in train.first + dev.first)
    if task in ("MRPC", "RTE"):
        assert any(text.count('"') % 2 for text in train.first)  # which a reader with quoting takes for one long cell
    assert train.labels is not None
    share = {"CoLA": 0.704, "SST-2": 0.558, "MRPC": 0.674, "STS-B": None, "RTE": 0.498, "WNLI": 0.491}[task]
    assert share is None or train.labels.mean() == pytest.approx(share, abs=6e-4)  # of label 1, as published


def test_train_rows_are_drawn_once_and_nested(sample: Path) -> None:
    whole = rows_of(load_task("sst2", config_of(sample)), "train")
    some = rows_of(load_task("sst2", config_of(sample, train_rows=12)), "train")
    few = rows_of(load_task("sst2", config_of(sample, train_rows=6)), "train")
    assert rows_of(load_task("sst2", config_of(sample, train_rows=6)), "train").ids == few.ids
    assert len(few) == 6
    assert set(few.ids) < set(some.ids) < set(whole.ids)
    positions = [int(i) for i in few.ids]
    assert positions == sorted(positions) != list(range(6))
    assert few.first == [whole.first[i] for i in positions]
    assert few.labels is not None
    assert whole.labels is not None
    assert few.labels.tolist() == whole.labels[positions].tolist()
    assert len(load_task("sst2", config_of(sample, train_rows=999)).splits["train"]) == TRAIN_ROWS


def test_held_out_rows_are_training_rows_and_dev_rows_are_gone(sample: Path) -> None:
    for name in ("mnli", "stsb"):
        whole = load_task(name, config_of(sample))
        task = hold_out(whole, parts=3)
        ids = {split: rows_of(task, split).ids for split in task.splits}
        every = rows_of(whole, "train").ids
        assert ids == {"train": [one for i, one in enumerate(every) if i % 3 != 2], HELD_OUT: every[2::3]}, name
        assert task.spec.dev_splits == (HELD_OUT,)


def test_dev_rows_are_the_first(sample: Path) -> None:
    data = load_task("mnli", config_of(sample, dev_rows=3), test=True)
    for name in ("dev_matched", "dev_mismatched"):
        assert rows_of(data, name).ids == ["0", "1", "2"]
    assert len(data.splits["test_matched"]) == TEST_ROWS


def test_the_hash_is_of_the_rows(sample: Path, tmp_path: Path) -> None:
    write_glue_sample(tmp_path)
    once = load_task("rte", config_of(sample)).sha256
    assert load_task("rte", config_of(tmp_path), test=True).sha256 == once
    assert load_task("rte", config_of(sample, train_rows=5)).sha256 != once
    assert load_task("rte", config_of(sample, dev_rows=5)).sha256 != once
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text(path.read_text().replace("\tnot_entailment\n", "\tentailment\n", 1))
    assert load_task("rte", config_of(tmp_path)).sha256 != once


def test_text_is_split_at_tabs_and_line_ends_only(tmp_path: Path) -> None:
    folder = tmp_path / "sst-2"
    folder.mkdir()
    odd = ['he said " so', "one\u2028two\x0b\x85", " spaces ", "", '""']
    content = "\ufeffsentence\tlabel\r\n" + "".join(f"{text}\t{i % 2}\r\n" for i, text in enumerate(odd)) + "\r\n"
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_bytes(content.encode())
    train = rows_of(load_task("SST-2", config_of(tmp_path)), "train")
    assert train.first == odd
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 0, 1, 0]


def test_broken_lines_of_qqp_are_counted(sample: Path, tmp_path: Path) -> None:
    write_glue_sample(tmp_path)
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "99\t1\t2\thow does one\nlearn\tthe map\t1\n")
    data = load_task("qqp", config_of(tmp_path))
    assert len(data.splits["train"]) == TRAIN_ROWS
    assert data.warnings == (f"{path}: lines with too few columns, left out as the official reader does: 2",)
    assert data.sha256 == load_task("qqp", config_of(sample)).sha256


@pytest.mark.parametrize(("task", "column"), [("QQP", "id"), ("QNLI", "index"), ("MRPC", None)])
def test_ids_are_those_of_the_file(tmp_path: Path, task: str, column: str | None) -> None:
    write_glue_sample(tmp_path)
    path = tmp_path / task / "dev.tsv"
    header, first, *others = path.read_text(encoding="utf-8-sig").split("\n")
    assert (header.split("\t")[0] == column) == (column is not None)
    path.write_text("\n".join([header, first if column is None else f"x17{first[1:]}", *others]))
    assert rows_of(load_task(task, config_of(tmp_path)), "dev").ids[:2] == ["0" if column is None else "x17", "1"]


def test_test_files_without_labels(tmp_path: Path) -> None:
    write_glue_sample(tmp_path)
    for task, row in (("WNLI", "0\ta\tb\t-1\n1\tc\td\t-1\n"), ("STS-B", "0\ta\tb\t-1\n")):
        label = "score" if task == "STS-B" else "label"
        (tmp_path / task / "test.tsv").write_text(f"index\tsentence1\tsentence2\t{label}\n{row}")
        assert rows_of(load_task(task, config_of(tmp_path), test=True), "test").labels is None
    (tmp_path / "WNLI" / "test.tsv").write_text("index\tsentence1\tsentence2\tlabel\n7\ta\tb\t1\n9\tc\td\t0\n")
    labelled = rows_of(load_task("WNLI", config_of(tmp_path), test=True), "test")
    assert labelled.ids == ["7", "9"]
    assert labelled.labels is None  # they would decide nothing
    (tmp_path / "WNLI" / "test.tsv").unlink()
    data = load_task("WNLI", config_of(tmp_path), test=True)
    assert list(data.splits) == ["train", "dev"]
    assert "WNLI: no test split, whose predictions the GLUE server needs" in data.warnings


@pytest.mark.parametrize("place", ["diagnostic/diagnostic.tsv", "AX/AX.tsv"])
def test_the_diagnostic_set_is_a_test_split_of_mnli(tmp_path: Path, place: str) -> None:
    write_glue_sample(tmp_path)
    path = tmp_path / place
    path.parent.mkdir()
    path.write_text("index\tsentence1\tsentence2\n0\tone map\tnot a map\n1\ta\tb\n")
    data = load_task("MNLI", config_of(tmp_path), test=True)
    rows = rows_of(data, "diagnostic")
    assert (rows.first, rows.second, rows.ids, rows.labels) == (["one map", "a"], ["not a map", "b"], ["0", "1"], None)
    assert "diagnostic" not in load_task("MNLI", config_of(tmp_path)).splits
    assert "diagnostic" not in load_task("RTE", config_of(tmp_path), test=True).splits
    assert resolve_names(["glue"], config_of(tmp_path)) == (list(GLUE_TASKS), [])


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def appended(line: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes() + line)


BROKEN = {
    "no file": ("WNLI", "dev", Path.unlink, ["dev.tsv: no such file", "has: test.tsv, train.tsv"]),
    "empty file": ("WNLI", "train", lambda p: p.write_text(""), ["train.tsv: is empty"]),
    "line ends only": ("CoLA", "train", lambda p: p.write_text("\n\n"), ["train.tsv: is empty"]),
    "header only": ("RTE", "dev", lambda p: p.write_text(p.read_text().split("\n")[0]), ["dev.tsv: has no rows"]),
    "column": ("SST-2", "train", replaced("sentence", "sentense"), ["no column 'sentence'", "'sentense', 'label'"]),
    "column twice": ("RTE", "train", replaced("index", "label"), ["two columns are named 'label'"]),
    "no label column": ("RTE", "dev", replaced("label", "gold"), ["no column 'label'", "'index', 'sentence1'"]),
    "label": (
        "RTE",
        "train",
        appended(b"9\ta\tb\tentailmen\n"),
        ["train.tsv:26: ", "'entailmen'", "mean 'entailment'"],
    ),
    "hidden label": (
        "WNLI",
        "dev",
        appended(b"9\ta\tb\t-1\n"),
        ["dev.tsv:10: 1 of 9 rows have no gold label ('-1' 1)"],
    ),
    "no gold label": (
        "MNLI",
        "dev_matched",
        replaced("\tneutral\n", "\t-\n"),
        ["dev_matched.tsv:3: ", "label ('-' 1)"],
    ),
    "no header": ("CoLA", "dev", appended(b"x\ta\t\tlate\n"), ["dev.tsv:9: unknown label 'a'"]),
    "columns": ("RTE", "dev", appended(b"9\ta\tentailment\n"), ["dev.tsv:10: has 3 columns, not 4 (index, "]),
    "more columns": ("QQP", "dev", appended(b"9\t1\t2\ta\tb\tc\t1\n"), ["dev.tsv:10: has 7 columns, not 6"]),
    "one column": ("SST-2", "dev", appended(b"late\n"), ["dev.tsv:10: has 1 column, not 2"]),
    "all short": ("QQP", "dev", lambda p: p.write_text("id\tqid1\n1\n"), ["no column 'question1'"]),
    "not UTF-8": ("SST-2", "train", appended(b"caf\xe9\t1\n"), ["train.tsv:26: is not UTF-8"]),
    "not a number": ("STS-B", "dev", replaced("\t0.000\n", "\thigh\n"), ["dev.tsv:2: label 'high' is not a finite"]),
    "nan": (
        "STS-B",
        "train",
        replaced("\t5.000\n", "\tnan\n"),
        ["train.tsv:7: 1 of 24 rows have no gold label ('nan' 1)"],
    ),
    "inf": ("STS-B", "train", replaced("\t5.000\n", "\t1e39\n"), ["train.tsv:7: label '1e39' is not a finite number"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str) -> None:
    write_glue_sample(tmp_path)
    task, split, change, words = BROKEN[case]
    change(tmp_path / task / f"{split}.tsv")
    check_error([str(tmp_path / task), *words], lambda: load_task(task, config_of(tmp_path)))


def test_a_bom_does_not_shift_the_line_of_an_error(tmp_path: Path) -> None:
    write_glue_sample(tmp_path)
    path = tmp_path / "MRPC" / "dev.tsv"
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    appended(b"1\t1\t2\tcaf\xe9\tb\n")(path)
    check_error("dev.tsv:10: is not UTF-8", lambda: load_task("MRPC", config_of(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "a.tsv"}, ["task.custom.own.dev: name the file of the rows that score"]),
        ({"dev": "a.tsv"}, ["task.custom.own.train: name the file", "only a regression of pairs needs none"]),
        ({"dev": "a.tsv", "kind": "regression"}, ["task.custom.own.train"]),
        ({"train": "a", "dev": "b", "folder": "c"}, ["task.custom.own.folder='c'", "write kind: retrieval"]),
        ({"kind": "retrieval"}, ["task.custom.own.folder: name the folder"]),
        ({"kind": "retrieval", "folder": "c", "dev": "b"}, ["task.custom.own.dev='b': has no effect on a retrieval"]),
        ({"kind": "retrieval", "folder": "c", "metrics": ["f1"]}, ["task.custom.own.metrics=['f1']: has no effect"]),
    ],
)
def test_files_that_a_kind_needs(settings: dict[str, object], words: list[str]) -> None:
    own = CustomTaskConfig(**settings)  # type: ignore[arg-type]
    check_error(words, lambda: task_spec("own", TaskDataConfig(custom={"own": own})))


def test_pairs_with_numbers_need_no_training_rows(sample: Path) -> None:
    """Half of their rows stands for them, whatever the caps."""
    own = CustomTaskConfig(
        dev=str(sample / "STS-B" / "train.tsv"),
        text="sentence1",
        text_pair="sentence2",
        label="score",
        kind="regression",
        metrics=["spearman"],
    )
    data = load_task("own", TaskDataConfig(custom={"own": own}))
    whole, half = rows_of(data, "dev"), rows_of(data, "train")
    assert data.has_one_split
    assert len(whole) == TRAIN_ROWS
    kept = seen_by_searches(whole)
    assert half.ids == [name for name, seen in zip(whole.ids, kept, strict=True) if seen]
    assert half.labels.tolist() == whole.labels[kept].tolist()
    assert data.spec.is_zero_shot
    assert not data.spec.trainable
    assert any(f"own: {TRAIN_ROWS} rows in one split; a fitness comes from {len(half)}" in one for one in data.warnings)
    capped = load_task("own", TaskDataConfig(custom={"own": own}, train_rows=3, dev_rows=5))
    assert (len(rows_of(capped, "train")), len(rows_of(capped, "dev"))) == (3, 5)
    check_error("task.name: 'own' has nothing to train on", lambda: require_trainable(data.spec, "task.name"))
