from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import math
import os
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
    ("b.txt", b"good\nbad\0 and so on to its end\nmore\n", "holds NUL bytes"),
    ("b.jsonl", b'{"text": "good"}\n{"text": "\\u0000"}\n{"text": "more"}\n', "holds NUL characters"),
    (
        "b.jsonl",
        b'{"text": "good"}\n{"text": "' + b"x" * 1001 + b'"}\n{"text": "more"}\n',
        "write one JSON object a line",
    ),
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


def test_a_number_of_too_many_digits_is_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": %s, "text": "one"}\n' % ("9" * 5000))
    with pytest.raises(UserError, match=r"a\.jsonl:1: is not JSON \(Exceeds the limit"):
        read(tmp_path / "a.jsonl", limit=10_000)


def test_a_line_of_exactly_the_limit_is_kept_and_the_one_after_a_long_line_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1000 + b"\r\n" + b"y" * 5_000_000 + b"\nafter")
    reader = read(path, skip_bad=True)
    assert [text for text, _ in reader.found] == ["x" * 1000, "after"]
    assert reader.bad_lines == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_every_system(tmp_path, end):
    path = tmp_path / "a.txt"
    path.write_bytes(end.join(["one", "", "two", "three", ""]).encode())
    assert read(path).found == [("one", True), ("two", True), ("three", False)]
    path.write_bytes(end.join(['{"text": "one"}', "", '{"text": "two"}']).encode())
    assert read(path).found == [("one", True), ("two", True)]
    path.write_bytes(end.join(["id,text", '1,"one', 'two"', "2,three"]).encode())
    assert read(path).found == [("one", True), ("two", False), ("three", True)]


def test_an_end_that_was_converted_twice_divides_no_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\r\ntwo\r\r\n\r\r\nthree\r\r\n")
    assert read(tmp_path / "a.txt").found == [("one", True), ("two", False), ("three", True)]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r"])
def test_line_ends_inside_a_line_end_paragraphs(tmp_path, end):
    (tmp_path / "a.txt").write_text(f"one{end} two\n{end}three\n", encoding="utf-8", newline="")
    want = [("one", True), ("two", False), ("three", False)]
    assert read(tmp_path / "a.txt").found == want
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"one{end}{end} two\n{end}three"}))
    assert read(tmp_path / "a.jsonl").found == want


def test_byte_order_marks_of_files_that_were_appended(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo\n\ufeffthree\nfour\ufefffive".encode())
    assert read(path).found == [("one", True), ("two", False), ("three", True), ("four", False), ("five", True)]
    path.write_bytes('\ufeff{"text": "one"}\n\ufeff{"text": "\ufefftwo"}'.encode())
    assert read(path).found == [("one", True), ("two", True)]
    path.write_bytes('\ufeff"text",id\none,1\n\ufefftwo,2\n'.encode())
    assert read(path).found == [("one", True), ("two", True)]


def test_text_between_the_tags_of_a_wikipedia_extraction(tmp_path):
    path = tmp_path / "wiki_00"
    one = '<doc id="1" url="x" title="One">\nOne\n\na &lt;b&gt; c\n</doc>\n'
    path.write_text(one + "\ufeff" + one.replace("One", "Two"))
    assert read(path).found == [("One", True), ("a <b> c", False), ("Two", True), ("a <b> c", False)]


def test_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id;größe\n1;"one; ""quoted""\n\ntwo"\n\n2;three\n', encoding="utf-8")
    assert read(path, field="größe").found == [('one; "quoted"', True), ("two", False), ("three", True)]
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b'id\ttext\n1\tan "open quote\n2\ttwo\n'))
    reader = read(path)
    assert reader.found == [('an "open quote', True), ("two", True)]
    assert reader.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.raw_done == reader.raw_total


BAD_ROWS = [
    (b"2,two,too many\n", "has 3 columns, not 2 as the header"),
    (b"2\n", "has 1 columns, not 2"),
    (b"id,text\n", "repeats the header"),
    (b'2,"two" more\n', "is not a valid table row"),
    (b"2," + b"x" * 1001 + b"\n", "field larger than field limit.*raise --shard_mb"),
    (b"2,\xff\n", "is not UTF-8"),
    (b"2,a\0b\n", "holds NUL bytes"),
]


@pytest.mark.parametrize(("row", "what"), BAD_ROWS)
def test_a_bad_row_of_a_table_is_named_or_skipped_and_counted(tmp_path, row, what):
    path = tmp_path / "b.csv"
    path.write_bytes(b"id,text\n1,one\n" + row + b"3,three\n")
    before = csv.field_size_limit()
    with pytest.raises(UserError, match=rf"b\.csv:3: .*{what}.*--on_bad_line skip"):
        read(path)
    reader = read(path, skip_bad=True)
    assert reader.found == [("one", True), ("three", True)]
    assert reader.bad_lines == 1
    assert csv.field_size_limit() == before


def test_a_quotation_mark_without_its_pair_names_the_lines_that_it_costs(tmp_path):
    (tmp_path / "b.csv").write_text('id,text\n1,"one\n2,two\n3,"three"\n4,four\n')
    reader = read(tmp_path / "b.csv", skip_bad=True)
    assert reader.found == [("four", True)]
    assert "b.csv:2: is not a valid table row to line 4 (" in reader.bad_places[0]


def test_end_of_text_divides_documents(tmp_path):
    (tmp_path / "stories.txt").write_text("One.\nTwo.\n<|endoftext|>\nThree.<|endoftext|>Four.\n")
    want = [("One.", True), ("Two.", False), ("Three.", True), ("Four.", True)]
    assert read(tmp_path / "stories.txt").found == want


def test_spaces_around_commas(tmp_path):
    (tmp_path / "b.csv").write_text('sep=,\nid, text\n1, "one, two"\n2, three\n')
    assert read(tmp_path / "b.csv").found == [("one, two", True), ("three", True)]


def test_where_all_is_skipped_the_first_bad_line_is_named(tmp_path):
    (tmp_path / "b.txt").write_bytes("café\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"no text in it, but bad lines, the first .*b\.txt:1: is not UTF-8"):
        read(tmp_path / "b.txt", skip_bad=True)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("https://example.org/a.txt", "download it"),
        ("s3://bucket/corpus", "download it"),
        ("corpus/*.jsonl", "name the folder"),
        ("corpus/", "no such file or folder; correct the path"),
        ("/corpus", "no such file or folder; correct the path"),
    ],
)
def test_paths_that_name_no_file(path, remedy):
    with pytest.raises(UserError, match=remedy):
        read(path)


def test_a_torn_table_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "a.csv.gz"
    rows = "".join(f"{i},{hashlib.sha256(str(i).encode()).hexdigest()}\n" for i in range(4000))
    data = gzip.compress(f"id,text\n{rows}".encode())
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match=r"a\.csv\.gz:\d{4}: cannot be read"):
        read(path)


def test_zstd_with_a_long_window_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "RC.zst"
    path.write_bytes(packer.compress(b'{"body": "one"}\n') + packer.flush())
    reader = read(path, field="body")
    assert reader.found == [("one", True)]
    assert reader.selection.files[path].window == 1 << 31


def test_what_zstd_has_no_memory_for_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "RC.zst"  # a window of 2**41 - 1 bytes at most, where 2**31 can be unpacked
    path.write_bytes(bytes.fromhex("28b52ffd 00 f8 010000"))
    with pytest.raises(UserError, match=r"RC\.zst:1: .*; unpack it first \(zstd -d --long=31 FILE\)"):
        read(path)


def test_the_beginning_is_shown_and_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n" + "x" * 100 + "\nlast\n")
    reader = SourceReader(SourceConfig(path=str(path)), max_line_bytes=1000)
    assert reader.beginning() == "one\ntwo\n" + "x" * 72
    assert [text for text, _ in reader] == ["one", "two", "x" * 100, "last"]
    assert reader.documents == 2


@pytest.mark.parametrize(("key", "value"), [("split", "train"), ("name", "x"), ("field", "text")])
def test_a_setting_without_effect_on_a_file_is_refused(tmp_path, key, value):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match=rf"sources\.{key}='{value}': has no effect on .*a\.txt.*; remove it"):
        read(tmp_path / "a.txt", **{key: value})


def test_an_infinite_weight_is_refused():
    with pytest.raises(UserError, match="finite"):
        SourceConfig(path="a", weight=math.inf)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read(tmp_path / "pipe")


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
    with pytest.raises(UserError, match=r"no file in this folder holds text \(notes\.md \(1\): of other kinds\)"):
        read(tmp_path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"doc {i}\nsecond" for i in range(3000)], "n": range(3000)}), path)
    reader = read(path)
    assert reader.documents == 3000
    assert reader.found[-2:] == [("doc 2999", True), ("second", False)]
    assert reader.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"no column 'body' \(columns: 'text', 'n'\)"):
        read(path, field="body")


def test_parquet_bad_row_and_torn_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:row 2: .*null"):
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
    for key in ("split", "name"):
        with pytest.raises(UserError, match=rf"sources\.{key}='dev': has no effect on .*plain"):
            read(tmp_path / "plain", **{key: "dev"})
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
    with pytest.raises(UserError, match="neither a local path nor an available hub data set"):
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
    with pytest.raises(UserError, match=r"owner/name: no column 'text' \(columns: 'body'\)"):
        list(readers[2])


def test_stamp_follows_the_file_and_the_options(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "b": "x"}')
    stamps = {read(path).stamp(), read(path).stamp(), read(path, field="b").stamp()}
    assert len(stamps) == 2
    path.write_text('{"text": "one", "b": "xx"}')
    assert read(path).stamp() not in stamps
