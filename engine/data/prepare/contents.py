"""What a file holds, by its first bytes, and by its name where these do not say."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.data.prepare.compression import (
    COMPRESSIONS,
    UNREADABLE,
    compression_of,
    decompressed,
    long_window,
    unreadable,
)

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "table",
    ".tsv": "table",
}
_HEAD = 1 << 16
_JSON_OBJECT = re.compile(rb'\s*\{\s*("(\\.|[^"\\])*"|\'[^\'\n]*\')\s*:')  # also as Python prints one, to be refused
_JSON_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')
_EXTRACTED = re.compile(rb"\s*<doc\s[^>]*\b(id|url|title)=[^>]*>[ \t\r]*\n")
_MARKUP = re.compile(
    rb"\s*(<(\?xml|!doctype|html|mediawiki)\b|<!--|<([a-z][\w.:-]*)(\s[^<>]*)?>([^\n]*</\3>)?[ \t\r]*(\n|$))", re.I
)
_LIST_ENTRY = re.compile(rb"[0-9a-fA-F]{32,128}[ \t]+\S.*|[a-z\d]+://\S+\s*")  # of SHA256SUMS; an address
_COLUMN = re.compile(r"[\w.-]+")
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b"))

_FOREIGN = (
    (rb"version https://git-lfs\.github\.com/spec/", "a git-lfs pointer, not the file itself: git lfs pull"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (or an office document): unzip it, or save it as text"),
    (rb".{257}ustar", "a tar archive: unpack it with tar -xf, and name the folder"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it with 7z x"),
    (rb"Rar!\x1a\x07", "a RAR archive: unpack it with unrar x"),
    (rb"\x04\x22\x4d\x18", "compressed with lz4: unpack it with lz4 -d"),
    (rb"\x1f\x9d|\x1f\xa0", "compressed with compress: unpack it with uncompress"),
    (rb"\x5d\x00\x00", "compressed with lzma: unpack it with unlzma"),
    (b"|".join(magic.pattern for magic in COMPRESSIONS.values()), "compressed twice: unpack it once"),
    (rb"%PDF-", "a PDF: take its text out of it (pdftotext)"),
    (rb"%!PS", "PostScript: take its text out of it (ps2txt)"),
    (rb"\{\\rtf", "a rich text document: save it as plain text"),
    (rb"\xd0\xcf\x11\xe0", "an office document: save it as plain text"),
    (rb"WARC/\d", "a web archive: take the text out of its records (trafilatura)"),
    (
        rb"ARROW1\x00|\xff\xff\xff\xff.{3}\x00",
        "an Arrow file: name the folder that save_to_disk wrote, or "
        "write it as Parquet (datasets: Dataset.from_file(FILE).to_parquet(NEW))",
    ),
    (rb"SQLite format 3|\x89HDF|Obj\x01", "a database or table: write its text as JSON lines"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32, not UTF-8: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (rb"([^\x00][\x00\x03-\x06]){8}", "UTF-16, not UTF-8: iconv -f UTF-16LE -t UTF-8 FILE > NEW"),
    (rb"([\x00\x03-\x06][^\x00]){8}", "UTF-16, not UTF-8: iconv -f UTF-16BE -t UTF-8 FILE > NEW"),
    (rb"[^\n]{0,999}\x1b\$[@B]", "ISO-2022-JP, not UTF-8: iconv -f ISO-2022-JP -t UTF-8 FILE > NEW"),
    (
        rb"-DOCSTART-|# (newdoc|sent_id|global\.columns)\b",
        "a table of words (CoNLL): write its sentences as text",
    ),
)
"""How files begin that hold no plain text; what they are, and how the text comes out of them."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, and how it is read."""

    kind: Literal["text", "extracted", "json", "table", "parquet", "aside", "foreign"]
    """How the file is read; extracted: text between <doc …> and </doc>; aside: no text, as files beside the data have
    none; foreign: no format that is read here."""
    why: str = ""
    """What it is instead and the remedy, for the last two."""
    compression: str | None = None
    """Usual ending of files with the same compression; None: not compressed."""
    window: int = 0
    """Bytes of memory that unpacking takes, where worth a word."""
    delimiter: str = ","
    """What stands between the columns of a table."""
    newline: Literal["\n", None] = "\n"
    """What ends a line; None: a carriage return does too, as in files of old Macs."""


def foreign(head: bytes) -> str | None:
    """Returns what an unpacked file that begins with `head` holds instead of text, and the remedy."""
    if what := next((what for magic, what in _FOREIGN if re.match(magic, head, re.DOTALL)), None):
        return what
    if (len(head) - len(head.translate(None, _CONTROLS))) * 20 > len(head):
        return "binary data, not text: give a file of text"
    return None


def named_kind(path: Path) -> str | None:
    """Returns the kind of contents that the name of a file claims: text, json, table or parquet; None for none."""
    return KINDS.get(inner_ending(path))


def inner_ending(path: Path) -> str:
    """Returns the ending of a file's name, in small letters, without that of a compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ending


def table_rows(lines: Iterable[str], delimiter: str) -> Any:
    """Reads a table: comma-separated ones have quoting (RFC 4180), also after a space; at tabs lines are just split."""
    if delimiter == "\t":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True, strict=True)
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)


def nested_rows(row: dict[str, Any], field: str) -> str | None:
    """Returns what the only object of a JSON file is where it has not `field` but a list of rows, and the remedy."""
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return f"has its rows in a list: jq -c '.{lists[0]}[]' FILE > NEW" if lists and field not in row else None


def look(path: Path, field: str) -> Contents:
    """Returns what `path` holds. `field` is where the text would be, in formats that have fields. Raises UserError
    where the file cannot be read."""
    window = 0
    try:
        with path.open("rb", buffering=0) as raw:
            packed = raw.read(_HEAD)
            compression = compression_of(packed)
            if compression == ".zst":
                window = long_window(packed)
            raw.seek(0)
            head = decompressed(raw, compression).read(_HEAD)
    except UNREADABLE as error:
        raise unreadable(f"{path}:1", error) from error
    head = head.removeprefix(codecs.BOM_UTF8)
    newline: Literal["\n", None] = None if b"\r" in head and b"\n" not in head else "\n"
    if newline is None:
        head = head.replace(b"\r", b"\n")
    contents = _contents_of(head, path, field, compressed=compression is not None)
    return replace(contents, compression=compression, window=window, newline=newline)


def _contents_of(head: bytes, path: Path, field: str, *, compressed: bool) -> Contents:
    named = named_kind(path)
    if not head.strip() and len(head) < _HEAD:
        return Contents("aside", "is empty: remove it, or give the right file")
    is_parquet = head.startswith(b"PAR1" if named == "parquet" else b"PAR1\x15")
    if is_parquet and compressed:
        return Contents("foreign", "is compressed Parquet: unpack it first; Parquet files hold their own compression")
    if is_parquet:
        return Contents("parquet")
    if what := foreign(head):
        return Contents("foreign", f"is {what}")
    if named == "json" or _JSON_OBJECT.match(head) or _JSON_ARRAY.match(head):
        return _json_contents(head, path, field)
    if found := _table_contents(head, path, field, named=named == "table") or _markup_contents(head):
        return found
    if all(map(_LIST_ENTRY.fullmatch, head.split(b"\n", 100)[:-1] or [head])):
        return Contents("aside", "lists checksums or addresses: give the files with the text")
    return Contents("parquet" if named == "parquet" else "text")  # the reader says what no Parquet is


def _json_contents(head: bytes, path: Path, field: str) -> Contents:
    line, _, more = head.strip().partition(b"\n")
    line = line.rstrip()
    cut = not more and len(head) == _HEAD
    goes_on = line[-1:] in (b"{", b"[", b",")
    if line.startswith(b"[") and (goes_on or cut or not more):
        each = ".[]" if _JSON_ARRAY.match(head) else f".[] | {{{json.dumps(field)}: .}}"
        return Contents("aside", f"is a JSON array, not JSON lines: jq -c '{each}' FILE > NEW.jsonl")
    if line.startswith(b"{") and goes_on and more:
        return Contents("aside", "is JSON of several lines, not JSON lines: jq -c . FILE > NEW.jsonl")
    if not more and not cut and inner_ending(path) not in (".jsonl", ".ndjson"):
        with contextlib.suppress(ValueError, RecursionError):  # the reader names what is not JSON
            row = json.loads(line)
            if isinstance(row, dict) and field not in row:
                why = nested_rows(row, field) or f"is one JSON object without {_missing('field', field, list(row))}"
                return Contents("aside", why)
    return Contents("json")


def _table_contents(head: bytes, path: Path, field: str, *, named: bool) -> Contents | None:
    """Returns the contents of a file that is named as a table, or has a header line with `field` and rows like it."""
    lines = re.sub(r"^sep=.\r?\n", "", head.decode("utf-8", "replace").lstrip("\r\n"))  # Excel's word on the separator
    header, *rows = lines.split("\n", 2)
    headers = {}
    for delimiter in "\t" if inner_ending(path) == ".tsv" else ",;\t|":
        headers[delimiter] = names = _columns(header.rstrip("\r"), delimiter)
        like_rows = len(names) > 1 and rows and delimiter in rows[0] and all(map(_COLUMN.fullmatch, names))
        if field in names and (named or like_rows):
            if names.count(field) > 1:
                return Contents("foreign", f"has two columns {field!r}: rename one")
            if len(head) < _HEAD and not "".join(rows).strip():
                return Contents("aside", "has a header and no rows: remove it, or give the right file")
            return Contents("table", delimiter=delimiter)
    longest = max(headers.values(), key=len)
    return Contents("aside", f"is a table without {_missing('column', field, longest)}") if named else None


def _columns(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip(" ") for name in next(table_rows([header], delimiter), [])]
    except csv.Error:  # prose with quotation marks
        return []


def _markup_contents(head: bytes) -> Contents | None:
    if _EXTRACTED.match(head):
        return Contents("extracted")
    if found := _MARKUP.match(head):
        tag = " ".join(found.group().decode("utf-8", "replace").split())[:40]
        return Contents(
            "foreign", f"begins with markup ({tag}): extract the text first (a Wikipedia dump: wikiextractor)"
        )
    return None


def _missing(what: str, field: str, names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:8]) or "none"
    return f"a {what} {field!r} (its {what}s: {shown}); set the source's `field`"
