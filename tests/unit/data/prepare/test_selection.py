from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from engine.config.tools import SourceConfig
from engine.data.prepare.selection import Selection, select_folder
from engine.errors import UserError

ROWS = '{"text": "one"}\n{"text": "two"}\n'
DECLARED = """---
configs:
- config_name: short
  data_files:
  - split: train
    path: plain/train-*
  - split: extra
    path: plain/unsupervised-*
- config_name: long
  data_files: other/*
---
# A data set
"""


def write(folder: Path, *names: str, text: str = ROWS) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def select(folder: Path, **settings: str) -> Selection:
    return select_folder(folder, SourceConfig(path=str(folder), **settings))


def chosen(folder: Path, **settings: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in select(folder, **settings).files]


@pytest.mark.parametrize(
    ("names", "split", "want"),
    [
        (["b.txt", "a.txt", "sub/c.txt.gz"], None, ["a.txt", "b.txt", "sub/c.txt.gz"]),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], None, "train"),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], "test", "test"),
        (["data/train_sft-00000-of-00001.jsonl", "data/x.jsonl"], "train_sft", "train_sft"),
        (["train.jsonl", "valid.jsonl", "notes.jsonl"], None, "train"),
        (["train.jsonl", "valid.jsonl", "notes.jsonl"], "validation", "valid"),
        (["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"], None, "train"),
        (["train/a-test.jsonl", "test/b.jsonl"], None, "train/"),
        (["imdb-train/a.jsonl", "imdb-dev/a.jsonl"], "validation", "dev"),
        (["a.jsonl", "dev.jsonl"], None, ["a.jsonl"]),
        (["Train.jsonl", "Test.jsonl"], None, "Train"),
        (["Train to Busan.jsonl", "Test cricket.jsonl"], None, ["Test cricket.jsonl", "Train to Busan.jsonl"]),
        (["contest.jsonl", "development.jsonl"], None, ["contest.jsonl", "development.jsonl"]),
    ],
)
def test_one_split_is_read(tmp_path, names, split, want):
    write(tmp_path, *names)
    found = chosen(tmp_path, **({"split": split} if split else {}))
    assert found == (want if isinstance(want, list) else [name for name in names if want in name])


def test_other_splits_are_named(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl", "dev.jsonl", "more.jsonl")
    assert sorted(select(tmp_path).left_out_lines()) == [
        "dev.jsonl (1): of split 'validation'",
        "more.jsonl (1): without a split",
        "test.jsonl (1): of split 'test'",
    ]
    with pytest.raises(
        UserError, match=r"no split 'tests' \(splits: test, train, validation\); set the source's `split`"
    ):
        select(tmp_path, split="tests")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "more.jsonl").unlink()
    with pytest.raises(UserError, match=r"no split 'train' \(splits: test, validation\)"):
        select(tmp_path)


def test_the_configurations_of_a_cloned_repository(tmp_path):
    write(tmp_path, "README.md", text=DECLARED)
    write(tmp_path, "plain/train-0.jsonl", "plain/unsupervised-0.jsonl", "other/a.jsonl", "plain/stray.jsonl")
    assert chosen(tmp_path, name="short") == ["plain/train-0.jsonl"]
    assert chosen(tmp_path, name="short", split="extra") == ["plain/unsupervised-0.jsonl"]
    assert chosen(tmp_path, name="long") == ["other/a.jsonl"]
    assert select(tmp_path, name="short").left_out_lines() == [
        "README.md (1): about the data, not data",
        "plain/unsupervised-0.jsonl (1): of split 'extra'",
        "other/a.jsonl, plain/stray.jsonl (2): without a split",
    ]
    (tmp_path / "plain" / "stray.jsonl").unlink()
    (tmp_path / "other" / "a.jsonl").rename(tmp_path / "plain" / "train-1.jsonl")
    assert chosen(tmp_path, name="short") == ["plain/train-0.jsonl", "plain/train-1.jsonl"]
    assert len(select(tmp_path, name="short").left_out_lines()) == 2
    (tmp_path / "plain" / "train-1.jsonl").unlink()
    for settings in ({}, {"name": "none"}):
        with pytest.raises(UserError, match=r"README\.md: .*'short', 'long'.*set the source's `name`"):
            select(tmp_path, **settings)
    (tmp_path / "plain" / "train-0.jsonl").unlink()
    with pytest.raises(UserError, match=r"README\.md: .*'train'.*complete the folder"):
        select(tmp_path, name="short")


def test_settings_without_effect_are_refused(tmp_path):
    write(tmp_path, "a.txt", "README.md", text="One.\n")
    for settings, why in (
        (
            {"split": "train"},
            r"sources\.split='train': has no effect on .*, where no name indicates a split; remove it",
        ),
        ({"name": "x"}, r"sources\.name='x': has no effect on .*, whose README\.md declares no configurations"),
        ({"field": "text"}, r"sources\.field='text': has no effect on .*, which is read as plain text; remove it"),
    ):
        with pytest.raises(UserError, match=why):
            select(tmp_path, **settings)
    write(tmp_path, "b.jsonl")
    assert chosen(tmp_path, field="text") == ["a.txt", "b.jsonl"]


def test_all_that_is_left_out_is_counted_and_named(tmp_path):
    folder = tmp_path / "folder"
    write(
        folder, "a.txt", "a.log.gz", "noend", "notes.md", ".git/config", ".gitattributes", "LICENSE.txt", text="One.\n"
    )
    write(folder, "rows")
    write(folder, "empty.txt", text="")
    write(folder, "infos.json", text='{\n "default": {}\n}')
    write(folder, "info.json", text='{"other": 1}')
    write(folder, "counts.csv", text="word,count\none,1\n")
    write(folder, *(f"{number}.md" for number in range(9)))
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"One.\n"))
    (folder / "binary.gz").write_bytes(gzip.compress(bytes(range(256))))
    write(tmp_path / "elsewhere", "b.txt", text="Two.\n")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(tmp_path / "elsewhere" / "b.txt", folder / "b.txt")
    os.symlink("nowhere", folder / "gone.txt")
    os.mkfifo(folder / "pipe.txt")
    found = select(folder)
    assert [path.name for path in found.files] == ["a.log.gz", "a.txt", "b.txt", "rows"]
    assert sorted(found.left_out_lines()) == [
        ".git, .gitattributes (2): hidden",
        "0.md, 1.md, 2.md, 3.md, 4.md and 6 more (11): of other kinds",
        "LICENSE.txt (1): about the data, not data",
        "a.txt.gz (1): also present unpacked",
        "binary.gz (1): is binary data, not text: give a file of text",
        "counts.csv (1): is a table without a column 'text' (its columns: 'word', 'count'); set the source's `field`",
        "empty.txt (1): is empty: remove it, or give the right file",
        "gone.txt, pipe.txt (2): no files (broken links, pipes)",
        "info.json (1): is one JSON object without a field 'text' (its fields: 'other'); set the source's `field`",
        "infos.json (1): is JSON of several lines, not JSON lines: jq -c . FILE > NEW.jsonl",
        "linked (1): links to folders, which are not followed",
    ]


def test_a_file_that_claims_to_be_text_and_is_not_stops_the_run(tmp_path):
    write(tmp_path, "a.txt", text="One.\n")
    write(tmp_path, "b.txt", text="<html>\n")
    with pytest.raises(UserError, match=r"b\.txt: begins with markup .*; or take it out of the folder"):
        select(tmp_path)


def test_a_file_of_two_names_is_read_once(tmp_path):
    write(tmp_path, "a.txt", text="One.\n")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    os.symlink("a.txt", tmp_path / "c.txt")
    found = select(tmp_path)
    assert [path.name for path in found.files] == ["a.txt"]
    assert found.left_out_lines() == ["b.txt, c.txt (2): links to files that are read already"]


def test_saved_data_sets_and_files_without_rows_are_left_out(tmp_path):
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "part-1.parquet")
    with pytest.raises(UserError, match=r"saved \(1\): saved by `datasets`: name this folder itself"):
        select(tmp_path)
    write(tmp_path, "part-0.jsonl")
    assert select(tmp_path).left_out_lines() == [
        "saved (1): saved by `datasets`: name this folder itself",
        "part-1.parquet (1): has no rows",
    ]


def test_parquet_is_checked_before_anything_is_read(tmp_path):
    write(tmp_path, "a.jsonl")
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: no column 'text' \(columns: 'body'\); set the source's `field`"):
        select(tmp_path)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"b\.parquet: not readable as Parquet .*; replace the file"):
        select(tmp_path)


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no file in this folder holds text \(it is empty\)"):
        select(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match=r"holds text \(a\.pdf \(1\): of other kinds\); known endings are \.txt, "):
        select(tmp_path)
