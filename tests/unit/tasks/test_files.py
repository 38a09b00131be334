"""Tasks from the user's own files, and what goes wrong with them."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_checks import check_error, rows_of

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.errors import UserError
from engine.tasks.load import load_task
from engine.tasks.specs import task_spec


def custom(folder: Path, train: str, dev: str = "", suffix: str = "csv", test: str | None = None, **settings: object):  # type: ignore[no-untyped-def]
    """A TaskDataConfig with the task `mine`, whose files have these contents (dev: the same as train)."""
    for name, content in (("train", train), ("dev", dev or train), ("test", test)):
        if content is not None:
            (folder / f"{name}.{suffix}").write_bytes(content.encode("latin-1" if "\x8b" in content else "utf-8"))
    files = {name: str(folder / f"{name}.{suffix}") for name in ("train", "dev", *(["test"] if test else []))}
    return TaskDataConfig(custom={"mine": CustomTaskConfig(**files, **settings)})  # type: ignore[arg-type]


def test_csv_with_quotes(tmp_path: Path) -> None:
    train = 'text,label\r\n"two\nlines, one ""cell""",good\r\nplain,bad\r\n'
    data = load_task("mine", custom(tmp_path, train, test="label,id,text\n,a7,hm\n,a8,so\n"), test=True)
    rows = rows_of(data, "train")
    assert rows.first == ['two\nlines, one "cell"', "plain"]
    assert data.spec.labels == ("bad", "good")
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0]
    assert rows.ids == ["0", "1"]
    assert (data.spec.metrics, data.spec.kind, data.spec.similarity) == (("accuracy",), "classification", False)
    assert not data.spec.glue
    test = rows_of(data, "test")
    assert (test.first, test.ids, test.labels) == (["hm", "so"], ["a7", "a8"], None)


def test_tsv_pairs_with_given_labels(tmp_path: Path) -> None:
    config = custom(
        tmp_path,
        'q\ta\tfits\n"what\tthis"\tyes\nwho\tshe\tno\n',
        suffix="tsv",
        text="q",
        text_pair="a",
        label="fits",
        labels=["yes", "no", "maybe"],
        metrics=["f1", "accuracy"],
    )
    data = load_task("MINE", config)
    rows = rows_of(data, "dev")
    assert (rows.first, rows.second) == (['"what', "who"], ['this"', "she"])
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1]
    assert data.spec.labels == ("yes", "no", "maybe")
    assert data.spec.metrics == ("f1", "accuracy")
    assert data.spec.pair


def test_json_lines_regression(tmp_path: Path) -> None:
    lines = [{"id": 5, "a": "ü\u2028", "b": "x", "score": 1}, {"score": "2.5", "b": "y", "a": "v", "id": 6, "c": None}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=number == 1) for number, line in enumerate(lines))
    config = custom(
        tmp_path,
        content,
        suffix="jsonl",
        text="a",
        text_pair="b",
        label="score",
        kind="regression",
        test='{"a": "p", "b": "q"}',
    )
    data = load_task("mine", config, test=True)
    rows = rows_of(data, "train")
    assert (rows.first, rows.second, rows.ids) == (["ü\u2028", "v"], ["x", "y"], ["5", "6"])
    assert rows.labels is not None
    assert rows.labels.tolist() == [1.0, 2.5]
    assert data.spec.similarity
    assert data.spec.metrics == ("pearson", "spearman")
    assert data.spec.labels == ()
    assert rows_of(data, "test").labels is None


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (['"b"', '"a"', '"b"'], ("a", "b")),
        (["10", "9", "-2"], ("-2", "9", "10")),
        (["1.0", "0", "1"], ("0", "1")),
        (['"1.0"', '"0.0"', '" 1 "'], ("0", "1")),
        (['"10"', '"9"', '"x"'], ("10", "9", "x")),
        (["true", "false", "true"], ("false", "true")),
    ],
)
def test_labels_are_found_in_all_training_rows(tmp_path: Path, written: list[str], labels: tuple[str, ...]) -> None:
    content = "".join(f'{{"text": "t", "label": {label}}}\n' for label in written)
    config = custom(tmp_path, content, suffix="jsonl")
    assert task_spec("mine", config).labels == ()
    assert load_task("mine", config).spec.labels == labels
    one = TaskDataConfig(custom=config.custom, train_rows=1)
    assert load_task("mine", one).spec.labels == labels


CSV = "text,label\na,x\nb,y\n"
BROKEN_CUSTOM: dict[str, tuple[str, str, dict[str, object], list[str]]] = {
    "column": ("csv", CSV, {"text": "texd"}, ["no column 'texd'", "'text', 'label'", "mine.text to 'text'"]),
    "pair": ("csv", CSV, {"text_pair": "zzz"}, ["no column 'zzz'", "set task.custom.mine.text_pair to one of them"]),
    "label column": ("csv", CSV, {"label": "lable"}, ["no column 'lable'", "task.custom.mine.label to 'label'"]),
    "one label": ("csv", "text,label\na,x\nb,x\n", {}, ["every row has the label 'x'"]),
    "no label": ("csv", CSV + "c,\n", {}, ["train.csv:4: 1 of 3 rows have no gold label ('' 1)"]),
    "label with tab": ("csv", CSV + 'c,"p\tq"\n', {}, ["train.csv:4: label 'p\\tq'"]),
    "unknown": ("csv", CSV + "c,z\n", {"labels": ["x", "y"]}, ["train.csv:4: unknown label 'z'", "'x', 'y'"]),
    "after a line break": ("csv", 'text,label\n"a\nb",x\nc,z\n', {"labels": ["x", "y"]}, ["csv:4: unknown label 'z'"]),
    "number": ("csv", "text,label\na,1\nb,two\n", {"kind": "regression"}, ["train.csv:3: label 'two' is not a finite"]),
    "quote": ("csv", CSV + '"c,z\n', {}, ["train.csv:4: is not CSV"]),
    "columns": ("csv", CSV + "c,d,x\n", {}, ["train.csv:4: has 3 columns, not 2 (text, label)"]),
    "no header": ("csv", "a b,x\nc d,y\n", {}, ["no column 'text' (its columns: 'a b', 'x')", "add a header line"]),
    "header again": ("csv", CSV + "text,label\nc,x\n", {}, ["train.csv:4: is the header line again"]),
    "header again, as Excel writes it": ("csv", CSV + "\ufeffText, label \nc,x\n", {}, ["csv:4: is the header line"]),
    "label column of a test file": ("csv", "text,id\na,1\n", {"label": "target"}, ["label to one of them, or give a"]),
    "rows in a list": ("json", '{"data": [{"text": "a", "label": "x"}]}', {}, ["json: has its rows in a list: jq"]),
    "columns in lists": ("json", '{"text": {"0": "a"}, "label": {"0": "x"}}', {}, ["orient='records', lines=True"]),
    "pickle": ("pkl", "\x80\x04\x95\x10" + "\0" * 7 + "]\x94.", {}, ["train.pkl: is binary data"]),
    "thousands": ("csv", 'text,label\na,"1,500"\n', {"kind": "regression"}, ["write 1.500 or 1500"]),
    "several labels": ("csv", 'text,label\na,x\nb,y\nc,"x, y"\n', {}, ["train.csv:4: label 'x, y' looks like several"]),
    "a list as label": ("csv", "text,label\na,[27]\nb,[3]\n", {}, ["train.csv:2: label '[27]' looks like several"]),
    "column twice": ("csv", "text,text,label\na,b,x\n", {}, ["two columns are named 'text'; rename one"]),
    "columns alike": ("csv", CSV, {"text_pair": "text"}, ["task.custom.mine: text, text_pair and label name text, "]),
    "Excel's separator alone": ("csv", "sep=;\n", {}, ["train.csv: is empty"]),
    "blanks only": ("jsonl", " \n\t\n", {}, ["train.jsonl: is empty"]),
    "not JSON": ("jsonl", '{"text": "a", "label": "x"}\n{text: b}\n', {}, ["train.jsonl:2: is not JSON"]),
    "JSON list": ("jsonl", '["a", "x"]\n', {}, ["train.jsonl:1: is JSON but not an object"]),
    "text missing": ("jsonl", '{"text": "a", "label": "x"}\n{"label": "y"}\n', {}, ["train.jsonl:2: has no 'text'"]),
    "label missing": ("jsonl", '{"text": "y"}\n{"text": "a", "label": "x"}\n', {}, ["jsonl:1: 1 of 2 rows have no"]),
    "text a number": ("jsonl", '{"text": 5, "label": "x"}\n', {}, ["train.jsonl:1: 'text' is 5, not text"]),
    "label null": ("jsonl", '{"text": "a", "label": null}\n', {"labels": ["x", "y"]}, ["no gold label (None 1)"]),
    "label a list": ("jsonl", '{"text": "a", "label": ["x"]}\n', {}, [":1: 'label' is [\"x\"], not one label"]),
    "label true": ("jsonl", '{"text": "a", "label": true}\n', {"kind": "regression"}, [":1: label True is not a"]),
    "label NaN": ("jsonl", '{"text": "a", "label": NaN}\n', {"kind": "regression"}, ["no gold label (nan 1)"]),
    "half a character": ("jsonl", '{"text": "\\ud83d", "label": "x"}\n', {}, ["train.jsonl:1: is not valid Unicode"]),
    "key twice": ("jsonl", '{"text": "a", "label": "x", "text": "b"}\n', {}, ["train.jsonl:1: 'text' occurs twice"]),
    "5,000 digits": ("jsonl", f'{{"text": "a", "label": {"9" * 5000}}}\n', {}, ["train.jsonl:1: cannot be read"]),
    "empty list": ("json", "[]", {}, ["train.json: is an empty list"]),
    "list of texts": ("json", '["a"]', {}, ["train.json:1: is JSON but not an object"]),
    "infinity": ("csv", "text,label\na,1\nb,inf\n", {"kind": "regression"}, [":3: label 'inf' is not a finite number"]),
    "decimal comma": ("csv", "text;label\na;1\nb;5,0\n", {"kind": "regression"}, [":3: label '5,0' is", "write 5.0"]),
    "numbers as classes": ("csv", "text,label\na,1\nb,2.5\n", {}, [":3: the labels are numbers like 2.5", "kind=regr"]),
    "git-lfs": ("csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", {}, ["a git-lfs pointer", "pull"]),
    "web page": ("csv", "<!DOCTYPE html>\n", {}, ["train.csv: is a web page"]),
    "NUL": ("csv", "text,label\na longer text,\0\n", {}, ["train.csv:2: has a NUL character"]),
    "torn Parquet": ("parquet", "PAR1 and no more", {}, ["train.parquet: is not readable as Parquet"]),
    "id": ("jsonl", '{"id": "a\\tb", "text": "t", "label": "x"}\n', {}, ["train.jsonl:1: 'id' is 'a\\tb'"]),
    "labels twice": ("csv", CSV, {"labels": ["x", "x"]}, ["task.custom.mine.labels=['x', 'x']"]),
    "labels one": ("csv", CSV, {"labels": ["x"]}, ["task.custom.mine.labels=['x']", "two or more"]),
    "labels spaced": ("csv", CSV, {"labels": ["x", "y "]}, ["task.custom.mine.labels", "'y '", "spaces around it"]),
    "labels tab": ("csv", CSV, {"labels": ["x", "a\tb"]}, ["task.custom.mine.labels", "'a\\tb'"]),
    "labels of numbers": ("csv", CSV, {"labels": ["x", "y"], "kind": "regression"}, ["mine.labels", "remove it"]),
    "metric": ("csv", CSV, {"metrics": ["pearson"]}, ["mine.metrics=['pearson']", "accuracy, f1, matthews"]),
    "no metric": ("csv", CSV, {"metrics": []}, ["task.custom.mine.metrics=[]"]),
    "metric of numbers": ("csv", CSV, {"metrics": ["f1"], "kind": "regression"}, ["pearson, spearman"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_CUSTOM)
def test_broken_custom_tasks(tmp_path: Path, case: str) -> None:
    suffix, content, settings, words = BROKEN_CUSTOM[case]
    check_error(words, lambda: load_task("mine", custom(tmp_path, content, suffix=suffix, **settings)))


def test_labels_of_the_dev_file_must_be_known(tmp_path: Path) -> None:
    config = custom(tmp_path, CSV, "text,label\nc,x\nd,Y\n")
    words = ["dev.csv:3: unknown label 'Y'", "the labels of mine: 'x', 'y'", "did you mean 'y'?"]
    check_error(words, lambda: load_task("mine", config))


PAIRS = [("one, token", "a"), ('a "map"', "b")]
WRITTEN = {
    "commas": ("t.csv", 'text,label\n"one, token",a\n"a ""map""",b\n', ""),
    "Excel's word": ("t.csv", 'sep=;\ntext;label\none, token;a\n"a ""map""";b\n', "separated by semicolons"),
    "quoted tabs": ("t.tsv", '"text"\t"label"\n"one, token"\t"a"\n"a ""map"""\t"b"\n', ""),
    "byte order mark, line ends of Windows": ("t.csv", '\ufefftext,label\r\n"one, token",a\r\n"a ""map""",b\r\n', ""),
    "line ends of old Macs": ("t.tsv", 'text\tlabel\rone, token\ta\ra "map"\tb\r', ""),
    "spaces in the header": ("t.csv", 'text, label\n"one, token",a\n"a ""map""",b\n', ""),
    "spaces before quotes": ("t.csv", 'text, label\n"one, token", "a"\n"a ""map""", b\n', ""),
    "files after one another": ("t.csv", '\ufefftext,label\n"one, token",a\n\ufeff"a ""map""",b\n', ""),
    "an index column": ("t.csv", ',text,label\n0,"one, token",a\n1,"a ""map""",b\n', ""),
    "semicolons": ("t.csv", 'text;label\none, token;a\n"a ""map""";b\n', "separated by semicolons"),
    "bars": ("t.csv", 'text|label\none, token|a\n"a ""map"""|b\n', "separated by vertical bars"),
    "tabs named .csv": ("t.csv", 'text\tlabel\none, token\ta\n"a ""map"""\tb\n', "separated by tabs"),
    "commas named .tsv": ("t.tsv", 'text,label\n"one, token",a\n"a ""map""",b\n', "separated by commas"),
    "an ending of its own": ("t.data", 'text\tlabel\none, token\ta\na "map"\tb\n', ""),
    "JSON lines": ("t.ndjson", '{"text": "one, token", "label": "a"}\n{"text": "a \\"map\\"", "label": "b"}\n', ""),
    "JSON lines named .csv": (
        "t.csv",
        '{"text": "one, token", "label": "a"}\n{"text": "a \\"map\\"", "label": "b"}\n',
        "is read as JSON",
    ),
    "a JSON list": ("t.json", '[\n{"text": "one, token", "label": "a"},\n{"text": "a \\"map\\"", "label": "b"}]', ""),
}  # fmt: skip


def read_pairs(path: Path) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Text and label of each row, and what was said."""
    mine = CustomTaskConfig(train=str(path), dev=str(path))
    data = load_task("mine", TaskDataConfig(custom={"mine": mine}))
    rows = rows_of(data, "train")
    assert rows.labels is not None
    return [(text, data.spec.labels[i]) for text, i in zip(rows.first, rows.labels, strict=True)], data.warnings


@pytest.mark.parametrize("case", WRITTEN)
def test_a_table_is_told_by_its_content(tmp_path: Path, case: str) -> None:
    name, content, says = WRITTEN[case]
    path = tmp_path / name
    path.write_bytes(content.encode())
    rows, warnings = read_pairs(path)
    assert rows == PAIRS
    said = [text for text in warnings if "although its name does not say so" in text]
    assert [says in text for text in said] == [True] * bool(says)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_parquet(tmp_path: Path, name: str) -> None:
    import pandas

    frame = pandas.DataFrame({"text": [text for text, _ in PAIRS], "label": [label for _, label in PAIRS]})
    frame.to_parquet(tmp_path / name)
    rows, warnings = read_pairs(tmp_path / name)
    assert rows == PAIRS
    assert any("is read as Parquet" in text for text in warnings) == (name == "t.csv")


def test_classes_of_parquet_files_are_read_by_name(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    for name, classes, labels in (("train", ["neg", "pos"], [0, 1]), ("dev", ["pos", "neg"], [0, -1])):
        features = Features(text=Value("string"), label=ClassLabel(names=classes))
        rows = {"text": [f"{name} 0", f"{name} 1"], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "dev")}
    mine = TaskDataConfig(custom={"mine": CustomTaskConfig(**files)}, unlabelled="leave_out")
    data = load_task("mine", mine)
    assert data.spec.labels == ("neg", "pos")
    assert [rows_of(data, name).labels.tolist() for name in files] == [[0, 1], [1]]  # type: ignore[union-attr]


NOTES: list[tuple[str, str, list[str]]] = [
    ("csv", 'text,label\n"a,x\nb,y\nc",x\nd,y\n', ["csv:2: a text holds whole rows of the file", "(1 such texts)"]),
    ("csv", "text,text2,label\na,b,x\nc,d,y\n", ["column 'text2' is not read", "set task.custom.mine.text_pair"]),
    (
        "tsv",
        "text\tlabel\nb'In Paris'\tx\nb\ty\n",
        ["texts between b' and ', as Python prints bytes (write them decoded): 1"],
    ),
    ("csv", "text,label\nnan,x\nNone,y\n", ["texts that say nan, None or the like, as tables write empty cells: 2"]),
    ("jsonl", '{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', ["empty texts: 1"]),
]


@pytest.mark.parametrize(("suffix", "content", "words"), NOTES, ids=[words[0] for _, _, words in NOTES])
def test_what_looks_wrong_in_texts_is_said(tmp_path: Path, suffix: str, content: str, words: list[str]) -> None:
    warnings = load_task("mine", custom(tmp_path, content, suffix=suffix)).warnings
    assert any(all(word in text for word in words) for text in warnings), warnings


def test_quoted_texts_of_several_lines_are_no_rows(tmp_path: Path) -> None:
    warnings = load_task("mine", custom(tmp_path, 'text,label\n"one, two\nand, so on",x\nb,y\n')).warnings
    assert not any("whole rows" in text for text in warnings)


def test_ids_are_found_in_any_case(tmp_path: Path) -> None:
    assert rows_of(load_task("mine", custom(tmp_path, "Id,text,label\n7,a,x\n8,b,y\n")), "dev").ids == ["7", "8"]


def test_a_compressed_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text,label\none,a\ntwo,b\n"))
    rows, _ = read_pairs(tmp_path / "t.csv.gz")
    assert rows == [("one", "a"), ("two", "b")]


def test_cells_may_be_as_long_as_documents(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"' + "the model " * 20_000 + '",a\none,b\n')
    rows, _ = read_pairs(tmp_path / "t.csv")
    assert [len(text) for text, _ in rows] == [200_000, 3]


@pytest.mark.parametrize(("encoding", "remedy"), [("utf-16", "-f UTF-16"), ("cp1252", "-f WINDOWS-1252")])
def test_other_encodings_are_named_with_the_command_that_helps(tmp_path: Path, encoding: str, remedy: str) -> None:
    (tmp_path / "t.csv").write_bytes("text,label\ncafé,a\n".encode(encoding))
    check_error([str(tmp_path / "t.csv"), f"iconv {remedy} -t UTF-8"], lambda: read_pairs(tmp_path / "t.csv"))


def test_quotation_marks_of_csv_in_a_file_of_tabs_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('text\tlabel\n"one ""small"" map"\ta\ntwo\tb\n')
    rows, warnings = read_pairs(tmp_path / "t.tsv")
    assert rows[0][0] == '"one ""small"" map"'
    assert "1 texts stand between" in warnings[0]


def test_custom_files_that_are_no_files(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"], "label": ["x"]}).save_to_disk(tmp_path / "saved")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("saved", "is a folder of `datasets`; write each split"), ("pipe", "is a pipe or a device")):
        mine = CustomTaskConfig(train=str(tmp_path / name), dev="dev.csv")
        check_error(words, lambda mine=mine: load_task("mine", TaskDataConfig(custom={"mine": mine})))  # type: ignore[misc]


def test_missing_custom_files(tmp_path: Path) -> None:
    config = custom(tmp_path, CSV)
    own = CustomTaskConfig(train=str(tmp_path / "train.csv"), dev=str(tmp_path / "def.csv"))
    check_error(
        ["task.custom.mine.dev=", "def.csv", "did you mean 'dev.csv'"],
        lambda: load_task("mine", TaskDataConfig(custom={"mine": own})),
    )
    own = CustomTaskConfig(train=str(tmp_path), dev=str(tmp_path / "dev.csv"))
    check_error(
        ["task.custom.mine.train=", "is a folder; name a file", "dev.csv"],
        lambda: load_task("mine", TaskDataConfig(custom={"mine": own})),
    )
    far = CustomTaskConfig(train=str(tmp_path / "no" / "train.csv"), dev=config.custom["mine"].dev)
    check_error(
        ["task.custom.mine.train=", f"nor is there a folder {tmp_path / 'no'}"],
        lambda: load_task("mine", TaskDataConfig(custom={"mine": far})),
    )


PIECES = ["text", "label", *',;|"{}[]:', "\t", "\n", "\r", "a", "Pos", "pos ", "-1", "1.0", "nan", "null", "true", "é",
          "\\ud83d", "\u200b", " ", "1e400", "9" * 5000]  # fmt: skip
STARTS = [
    "",
    "text,label\n",
    "text\tlabel\n",
    "text;label\n",
    '{"text": "a", "label": "x"}\n',
    '[{"text": "a", "label": ',
]


@given(
    start=st.sampled_from(STARTS),
    rest=st.lists(st.sampled_from(PIECES), max_size=12),
    ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ""]),
    kind=st.sampled_from(["classification", "regression"]),
    raw=st.binary(max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(start, rest, ending, kind, raw) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{ending}"
        path.write_bytes((start + "".join(rest)).encode() + raw)
        mine = CustomTaskConfig(train=str(path), dev=str(path), kind=kind)
        refusal = None
        try:
            load_task("mine", TaskDataConfig(custom={"mine": mine}, unlabelled="leave_out"))
        except UserError as error:
            refusal = str(error)
        assert refusal is None or (str(path) in refusal and "\n" not in refusal)
