from __future__ import annotations

import contextlib
import io
from pathlib import Path

import zstandard
from datasets import Dataset

from engine.config.tools import SourceConfig
from engine.data.prepare.progress import print_sources
from engine.data.prepare.sources import SourceReader


def shown(*paths: Path) -> list[str]:
    output = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    with contextlib.redirect_stdout(output):
        print_sources([SourceReader(SourceConfig(path=str(path)), max_line_bytes=1000) for path in paths])
    return output.buffer.getvalue().decode().splitlines()


def test_what_is_read_how_it_begins_and_what_is_left_out(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.ndjson").write_text('{"text": "\\u001b[1mGröße\\none"}\n')
    (folder / "train.txt").write_text("two")
    (folder / "test.ndjson").write_text("{}")
    (tmp_path / "a.gz").write_text("not packed")
    Dataset.from_dict({"text": ["three"]}).save_to_disk(str(tmp_path / "saved"))
    assert shown(folder, tmp_path / "a.gz", tmp_path / "saved") == [
        f"{folder}: 1 file of JSON lines, 1 file of plain text, column 'text', beginning: "
        "\\x1b[1mGr\\xf6\\xdfe\\none\\ntwo",
        f"{folder}: left out test.ndjson (1): of split 'test'",
        f"{tmp_path / 'a.gz'}: 1 file of plain text, beginning: not packed",
        f"{tmp_path / 'saved'}: a folder saved by `datasets`, column 'text', beginning: three",
    ]


def test_the_memory_of_a_long_zstd_window_is_said(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(packer.compress(b"one\n") + packer.flush())
    assert shown(path) == [
        f"{path}: 1 file of plain text in .zst, beginning: one",
        f"{path}: unpacking takes 268 MB of memory (a long zstd window)",
    ]


def test_a_file_that_stands_in_two_sources_is_said(tmp_path):
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    path.write_text("one\n")
    assert (
        shown(path.parent, path)[-1]
        == f"{path}: 1 file of an earlier source, read again (use weight to repeat a source)"
    )
