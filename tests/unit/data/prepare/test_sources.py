from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from engine.config.tools import SourceConfig
from engine.data.prepare.sources import SourceReader
from engine.errors import UserError

TEXT = "First paragraph.\nSecond – ünïcode.\n\n\nNew document.\n"
WANT = [("First paragraph.", True), ("Second – ünïcode.", False), ("New document.", True)]


def read(path: Path | str, **options) -> SourceReader:
    fields = {k: options.pop(k) for k in ("field", "split", "name") if k in options}
    reader = SourceReader(SourceConfig(path=str(path), **fields), max_line_bytes=options.pop("limit", 1000), **options)
    reader.found = [tuple(paragraph) for paragraph in reader]
    return reader


def pack(data: bytes, suffix: str) -> bytes:
    return {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda d: zstandard.ZstdCompressor().compress(d),
    }[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_text_files_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    raw = pack(TEXT.encode(), suffix)
    path.write_bytes(raw)
    reader = read(path)
    assert reader.found == WANT
    assert reader.documents == 2
    assert reader.digest() == hashlib.sha256(raw).hexdigest()
    assert reader.raw_done == reader.raw_total == len(raw)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_several_compressed_members_are_all_read(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(b"one\n", suffix) + pack(b"two\n", suffix))
    assert read(path).found == [("one", True), ("two", False)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_torn_compressed_file_is_an_error_with_its_place(tmp_path, suffix, skip_bad):
    path = tmp_path / f"a.txt{suffix}"
    lines = "".join(f"line {hashlib.sha256(str(i).encode()).hexdigest()}\n" for i in range(4000))
    data = pack(lines.encode(), suffix)
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match=rf"{path.name}:\d+: cannot be read"):
        read(path, skip_bad=skip_bad)


def test_json_lines_documents_and_their_paragraphs(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "a\n\n b "}) + "\n\n" + json.dumps({"body": ""}) + "\n" + '{"body": "c"}')
    reader = read(path, field="body")
    assert reader.found == [("a", True), ("b", False), ("c", True)]
    assert reader.documents == 2


BAD_LINES = [
    ("b.txt", b"good\nbad \xff byte\nmore\n", "is not UTF-8"),
    ("b.txt", b"good\n" + b"x" * 1001 + b"\nmore\n", "longer than a shard"),
    ("b.jsonl", b'{"text": "good"}\n{"text": \n{"text": "more"}\n', "is not JSON"),
    ("b.jsonl", b'{"text": "good"}\n[1]\n{"text": "more"}\n', "not an object"),
    ("b.jsonl", b'{"text": "good"}\n{"body": "x"}\n{"text": "more"}\n', "has no field 'text'.*'body'"),
    ("b.jsonl", b'{"text": "good"}\n{"text": 3}\n{"text": "more"}\n', "is int, not text"),
    ("b.jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n{"text": "more"}\n', "not valid Unicode"),
]


@pytest.mark.parametrize(("name", "data", "what"), BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, name, data, what):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}:2: .*{what}.*--on_bad_line skip"):
        read(path)
    reader = read(path, skip_bad=True)
    assert [text for text, _ in reader.found] == ["good", "more"]
    assert reader.bad_lines == 1
    assert f"{name}:2" in reader.bad_places[0]


def test_a_line_of_exactly_the_limit_is_kept_and_the_one_after_a_long_line_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1000 + b"\r\n" + b"y" * 5_000_000 + b"\nafter")
    reader = read(path, skip_bad=True)
    assert [text for text, _ in reader.found] == ["x" * 1000, "after"]
    assert reader.bad_lines == 1


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert read(tmp_path / "a.txt").found == [("one", True), ("two", True)]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_empty_file_is_an_error_that_names_it(tmp_path, content, skip_bad):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.txt"):
        read(tmp_path / "empty.txt", skip_bad=skip_bad)


def test_a_folder_is_read_in_order_and_its_empty_file_can_be_skipped(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    reader = read(tmp_path)
    assert reader.found == [("one", True), ("two", True), ("three", True)]
    (tmp_path / "a2.jsonl").write_text('{"text": ""}')
    with pytest.raises(UserError, match=r"a2\.jsonl: is empty"):
        read(tmp_path)
    assert read(tmp_path, skip_bad=True).bad_lines == 1


def test_a_folder_without_known_files(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no file in this folder holds text \(1 of other kinds: notes\.md\)"):
        read(tmp_path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"doc {i}\nsecond" for i in range(3000)], "n": range(3000)}), path)
    reader = read(path)
    assert reader.documents == 3000
    assert reader.found[-2:] == [("doc 2999", True), ("second", False)]
    assert reader.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"no column 'body' \(columns: text, n\)"):
        read(path, field="body")


def test_parquet_bad_row_and_torn_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:row 2: .*NoneType"):
        read(path)
    assert read(path, skip_bad=True).bad_lines == 1
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not readable as Parquet"):
        read(path)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="unpack it first"):
        read(packed)


def test_a_datasets_folder(tmp_path):
    data = Dataset.from_dict({"text": ["one\ntwo", "three"]})
    data.save_to_disk(str(tmp_path / "plain"))
    reader = read(tmp_path / "plain")
    assert reader.found == [("one", True), ("two", False), ("three", True)]
    with pytest.raises(UserError, match="no column 'body'"):
        read(tmp_path / "plain", field="body")
    DatasetDict({"dev": data}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits", split="dev").documents == 2
    with pytest.raises(UserError, match=r"no split 'train' \(splits: dev\)"):
        read(tmp_path / "splits")


@pytest.mark.parametrize("name", ["/no/such/file.txt", "./missing", "missing.jsonl", "a/b/c"])
def test_a_missing_path_does_not_ask_the_hub(name):
    with pytest.raises(UserError, match="no such file"):
        read(name)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a local path nor a hub data set"):
        read("mapdistill-no-such-owner/mapdistill-no-such-data")


def test_a_data_set_by_name_is_streamed(tmp_path, monkeypatch):
    """`datasets` resolves owner/name to a folder of the working directory as well as to the hub: the same code path,
    without a network. The folder appears after the reader has taken the name for a hub data set."""
    monkeypatch.chdir(tmp_path)
    readers = [
        SourceReader(SourceConfig(path="owner/name", field=f), max_line_bytes=1000) for f in ("body", "body", "text")
    ]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text('{"body": "one\\ntwo"}\n{"body": "three"}\n')
    assert [tuple(p) for p in readers[0]] == [("one", True), ("two", False), ("three", True)]
    assert readers[0].raw_total is None
    assert len(list(readers[1])) == 3
    assert readers[0].digest() == readers[1].digest() != hashlib.sha256().hexdigest()
    with pytest.raises(UserError, match=r"owner/name: no column 'text' \(columns: body\)"):
        list(readers[2])


def test_stamp_follows_the_file_and_the_options(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "b": "x"}')
    stamps = {read(path).stamp(), read(path).stamp(), read(path, field="b").stamp()}
    assert len(stamps) == 2
    path.write_text('{"text": "one", "b": "xx"}')
    assert read(path).stamp() not in stamps
