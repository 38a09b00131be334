from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from engine.data.prepare.contents import look
from engine.errors import UserError

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["one"]}), file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "one")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def seen(tmp_path: Path, name: str, data: bytes, field: str = "text"):
    (tmp_path / name).write_bytes(data)
    return look(tmp_path / name, field)


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.txt", b"One line.\n", "text"),
        ("a.log", b"One line.\n", "text"),
        ("a.txt", b'"One," he said, "and two".\n', "text"),
        ("a.txt", b"text, more of it\nand, so on\n", "text"),
        ("a.txt", b"<unk> of a treebank\n", "text"),
        ("a.txt", b"[1] A reference\n", "text"),
        ("a.txt", b"{braces} in prose\n", "text"),
        ("a.txt", b"\x1b[31mred\x1b[0m\n", "text"),
        ("a.txt", b" \n" * 70_000, "text"),
        ("a.txt", b"https://example.org says so.\n", "text"),
        ("a.txt", b"{'text': 'as Python prints it'}\n", "json"),
        ("a.jsonl", ROWS, "json"),
        ("a.ndjson", ROWS, "json"),
        ("a.JSONL", ROWS, "json"),
        ("a.txt", ROWS, "json"),
        ("a", ROWS, "json"),
        ("a.csv", ROWS, "json"),
        ("a.txt", b"\xef\xbb\xbf" + ROWS, "json"),
        ("a.txt", b'\n{"text": "' + b"x" * 70_000 + b'"}\n', "json"),
        ("a.json", b'{"text": "one"}', "json"),
        ("a.jsonl", b'{"other": "one"}', "json"),
        ("a.json", b"not JSON", "json"),
        ("a.json", b'["one"]\n["two"]\n', "json"),
        ("a.csv", b"text,label\none,a\n", "table"),
        ("a.CSV", b"text\none\n", "table"),
        ("a.txt", b"id\ttext\n1\tone\n", "table"),
        ("a.parquet", parquet(), "parquet"),
        ("a.txt", parquet(), "parquet"),
        ("a.parquet", b"torn", "parquet"),
        ("wiki_00", b'<doc id="1" url="x" title="One">\nOne\n</doc>\n', "extracted"),
    ],
)
def test_kinds(tmp_path, name, data, kind):
    found = seen(tmp_path, name, data)
    assert (found.kind, found.why) == (kind, "")


@pytest.mark.parametrize(
    ("name", "data", "kind", "why"),
    [
        ("a.txt", b"", "aside", "is empty"),
        ("a.txt.gz", gzip.compress(b" \n"), "aside", "is empty"),
        ("a.json", b'[{"text": "one"}]', "aside", "is a JSON array, not JSON lines: jq -c '.[]' FILE > NEW.jsonl"),
        ("a.json", b'[\n {"text": "one"}\n]', "aside", "is a JSON array"),
        ("a.txt", b'[{"text": "one"},\n{"text": "two"}]', "aside", "is a JSON array"),
        ("a.json", b"[" + b'{"text": "one"}, ' * 9_000, "aside", "is a JSON array"),
        ("a.json", b'{\n "text": "one"\n}', "aside", "is JSON of several lines, not JSON lines: jq -c ."),
        ("a.txt", b'{"a": {\n "b": 1}}', "aside", "is JSON of several lines"),
        ("a.json", b'["one", "two"]', "aside", """jq -c '.[] | {"text": .}' FILE > NEW.jsonl"""),
        ("a.json", b'{"data": [{"text": "one"}]}', "aside", "has its rows in a list: jq -c '.data[]' FILE > NEW"),
        ("SHA256SUMS.txt", b"%064x *./00.jsonl.zst\n" % 7 * 2, "aside", "lists checksums or addresses"),
        ("urls.txt", b"http://www.imdb.com/title/tt0064354\r\n" * 200, "aside", "lists checksums or addresses"),
        ("a.csv", b"id,text\r\n", "aside", "has a header and no rows"),
        ("a.json", b'{"other": 1}', "aside", r"without a field 'text' (its fields: 'other'); set the source's `field`"),
        ("a.csv", b"label;body\na;one\n", "aside", "without a column 'text' (its columns: 'label', 'body')"),
        ("a.csv", b"text,text\none,two\n", "foreign", "has two columns 'text'"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "foreign", "git lfs pull"),
        ("a.parquet.gz", gzip.compress(parquet()), "foreign", "is compressed Parquet: unpack it first"),
        ("a.gz", gzip.compress(gzip.compress(b"one")), "foreign", "is compressed twice"),
        ("a.zip", zipped(), "foreign", "is a zip archive"),
        ("a.xz", lzma.compress(tar()), "foreign", "is a tar archive"),
        ("a.txt", b"%PDF-1.7\n", "foreign", "is a PDF"),
        ("a.gz", gzip.compress(b"WARC/1.0\r\n"), "foreign", "is a web archive"),
        ("a.txt", bytes(range(256)) * 9, "foreign", "is binary data"),
        ("a.txt", "one".encode("utf-16"), "foreign", "is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "one and two".encode("utf-16-le"), "foreign", "iconv -f UTF-16LE"),
        ("a.txt", "one and two".encode("utf-16-be"), "foreign", "iconv -f UTF-16BE"),
        ("a.txt", "Привет, мир".encode("utf-16-le"), "foreign", "iconv -f UTF-16LE"),
        ("a.txt", "one".encode("utf-32"), "foreign", "iconv -f UTF-32"),
        ("a.txt", "日本語".encode("iso-2022-jp"), "foreign", "iconv -f ISO-2022-JP"),
        ("a.txt", b"-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n", "foreign", "is a table of words (CoNLL)"),
        ("a.html", b"<!DOCTYPE html>\n<p>one", "foreign", "begins with markup (<!DOCTYPE): extract the text first"),
        ("a.txt", b'<?xml version="1.0"?>\n', "foreign", "begins with markup"),
        ("a.bz2", bz2.compress(b'<mediawiki xmlns="x">\n'), "foreign", "a Wikipedia dump: wikiextractor"),
        ("a.txt", b"<DOC>\n<TEXT>\none\n", "foreign", "begins with markup (<DOC>)"),
        ("a.txt", b'<text\nid="1">\none\n', "foreign", 'begins with markup (<text id="1">): extract'),
        ("a.txt", b"<s> one two </s>\n", "foreign", "begins with markup"),
    ],
)
def test_what_holds_no_text_is_named(tmp_path, name, data, kind, why):
    found = seen(tmp_path, name, data)
    assert found.kind == kind
    assert why in found.why


def test_columns_that_a_table_must_have(tmp_path):
    assert seen(tmp_path, "a.csv", b"label;body\na;one\n", "body").delimiter == ";"
    assert seen(tmp_path, "a.csv", b"sep=;\r\nid; text\r\n1;one\r\n").delimiter == ";"
    assert seen(tmp_path, "a.tsv", b'"id\ttext\n1\tone\n').delimiter == "\t"
    assert seen(tmp_path, "a.csv", "id,größe\n1,one\n".encode(), "größe").kind == "table"


@pytest.mark.parametrize(
    ("data", "compression"),
    [
        (b"one\n", None),
        (gzip.compress(b"one\n"), ".gz"),
        (bz2.compress(b"one\n"), ".bz2"),
        (lzma.compress(b"one\n"), ".xz"),
        (zstandard.compress(b"one\n"), ".zst"),
        (b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + zstandard.compress(b"one\n"), ".zst"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.ZST"])
def test_compression_is_told_by_the_contents(tmp_path, data, compression, name):
    found = seen(tmp_path, name, data)
    assert (found.kind, found.compression, found.window) == ("text", compression, 0)


@pytest.mark.parametrize(("data", "newline"), [(b"a\rb\r", None), (b"a\r\nb\r\n", "\n"), (b"a\r\r\nb", "\n")])
def test_line_ends(tmp_path, data, newline):
    assert seen(tmp_path, "a.txt", data).newline == newline


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_torn_at_its_beginning(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    data = pack(os.urandom(3000))
    with pytest.raises(UserError, match=rf"a\{suffix}:1: cannot be read from here on .*; replace the file"):
        seen(tmp_path, f"a{suffix}", data[:200])
    with pytest.raises(UserError, match=rf"a\{suffix}:1: cannot be read from here on .*; replace the file"):
        seen(tmp_path, f"a{suffix}", data[:10])
