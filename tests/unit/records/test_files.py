"""Folders and links that are there completely or not at all."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from engine.records.files import relative_link, replaced


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    with replaced(folder) as part:
        (part / "a").write_text("old")
    with pytest.raises(FileNotFoundError), replaced(folder) as part:
        (part / "missing" / "b").write_text("half")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == []
    assert (folder / "a").read_text() == "old"
    with replaced(folder) as part:
        (part / "b").write_text("new")
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    assert [path.name for path in folder.iterdir()] == ["b"]


WRITES_FOR_EVER = """
import itertools, pathlib, sys
from engine.records.files import replaced
for i in itertools.count():
    with replaced(pathlib.Path(sys.argv[1])) as part:
        for name in ("a", "b"):
            (part / name).write_text(str(i))
    if i == 0:
        print("begun", flush=True)
"""


@pytest.mark.faults
def test_after_a_kill_no_folder_is_half_and_the_next_one_cleans(tmp_path: Path) -> None:
    rng, reached = random.Random(7), []
    for attempt in range(4):
        folder = tmp_path / str(attempt) / "report"
        words = [sys.executable, "-c", WRITES_FOR_EVER, str(folder)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            time.sleep(rng.uniform(0.05, 0.15))
            writer.send_signal(signal.SIGKILL)
        if folder.is_dir():
            assert (folder / "a").read_text() == (folder / "b").read_text()
            reached.append(int((folder / "a").read_text()))
        with replaced(folder):
            pass
        assert list(folder.parent.iterdir()) == [folder]
    assert max(reached) > 10


def test_a_link_is_moved_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        relative_link(tmp_path / "model", tmp_path / name)
        assert (tmp_path / "model").readlink() == Path(name)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "model"}
