"""What a teacher has captured, read back: bit for bit, after kills, from several processes, within its limit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT
from teacher_passes import assert_same, batches, load, open_cache
from tiny_encoders import save_tiny

from engine.errors import UserError


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    return Path(save_tiny("bert", tmp_path / "teacher"))


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_read_is_what_was_computed(
    tmp_path: Path, teacher_folder: Path, dtype: torch.dtype, padded: bool, unpadded: bool
) -> None:
    teacher = load(teacher_folder, dtype=dtype, unpadded=unpadded)
    given = batches(3, padded=padded)
    want = [teacher(batch) for batch in given]
    first = open_cache(teacher, tmp_path / "cache")
    for features, batch in zip(want, given, strict=True):
        assert_same(features, first(batch))
    assert (first.hits, first.misses) == (0, 3)
    assert_same(want[1], first(given[1]))  # also by the process that has just written it
    first.close()
    second = open_cache(teacher, tmp_path / "cache")
    for features, batch in zip(reversed(want), reversed(given), strict=True):
        assert_same(features, second(batch))
    assert (second.hits, second.misses) == (3, 0)


def test_it_says_what_it_will_write_and_stops_at_its_limit(tmp_path: Path, teacher_folder: Path) -> None:
    teacher, given = load(teacher_folder, unpadded=False), batches(4)
    said: list[str] = []
    whole = open_cache(teacher, tmp_path / "whole", said)
    whole.expect(given)
    assert "0 of 4 batches" in said[0]
    assert "writing up to 0.00 GiB more" in said[0]
    for batch in given:
        whole(batch)
    estimate = sum(batch.counts.positions for batch in given) * whole.bytes_per_token()
    assert estimate <= whole.size() <= 1.1 * estimate
    whole.expect(given)
    assert "4 of 4 batches" in said[1]
    assert "writing" not in said[1]

    small = open_cache(teacher, tmp_path / "small", said, gib=whole.size() / 2**30 * 0.6)
    small.expect(given)
    assert "proxy.teacher_cache_gib=" in said[2]
    for batch in [*given, *given]:
        small(batch)
    assert small.size() <= 0.6 * whole.size()
    assert (small.hits, small.misses) == (2, 6)


@pytest.mark.faults
def test_a_torn_end_is_overwritten(tmp_path: Path, teacher_folder: Path) -> None:
    teacher, given = load(teacher_folder), batches(3)
    first = open_cache(teacher, tmp_path / "cache")
    for batch in given[:2]:
        first(batch)
    first.close()
    index, data = tmp_path / "cache" / "part-0.jsonl", tmp_path / "cache" / "part-0.bin"
    index.write_text(index.read_text() + '{"batch": "0000", "at": 12')
    data.write_bytes(data.read_bytes() + b"half a tensor")
    second = open_cache(teacher, tmp_path / "cache")
    assert_same(teacher(given[2]), second(given[2]))
    second.close()
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    assert [line["at"] for line in lines] == [0, lines[0]["end"], lines[1]["end"]]
    assert lines[2]["end"] == data.stat().st_size
    third = open_cache(teacher, tmp_path / "cache")
    for batch in given:
        assert_same(teacher(batch), third(batch))
    assert third.misses == 0

    data.write_bytes(data.read_bytes()[: lines[1]["end"] - 5])  # a disk that lost its end
    fourth = open_cache(teacher, tmp_path / "cache")
    for batch in given:
        assert_same(teacher(batch), fourth(batch))
    assert fourth.misses == 2


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from teacher_passes import batches, load, open_cache
cache = open_cache(load(Path(sys.argv[1])), Path(sys.argv[2]))
step = int(sys.argv[4])  # one goes backwards, so that both have something to write
for number, batch in enumerate(batches(400)[::step]):
    cache(batch)
    if number == 3:
        print("begun", flush=True)
        sys.stdin.readline()  # until the other one has begun too: it would find everything done
"""


@pytest.mark.faults
def test_two_writers_and_a_kill_leave_whole_entries(tmp_path: Path, teacher_folder: Path) -> None:
    words = [
        sys.executable,
        "-c",
        WRITER,
        str(teacher_folder),
        str(tmp_path / "cache"),
        str(ROOT / "tests" / "support"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*words, step], env=env, **pipes) for step in ("1", "-1")]  # type: ignore[call-overload]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "begun\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        time.sleep(0.1)
        writers[0].send_signal(signal.SIGKILL)
        writers[1].wait(timeout=200)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert {path.name for path in (tmp_path / "cache").glob("*.bin")} == {"part-0.bin", "part-1.bin"}
    teacher, given = load(teacher_folder), batches(400)
    reader = open_cache(teacher, tmp_path / "cache")
    for batch in given[:20]:
        assert_same(teacher(batch), reader(batch))
    assert reader.misses == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"proxy\.teacher_cache: .*file/cache"):
        open_cache(load(teacher_folder), tmp_path / "file" / "cache")


def test_entries_of_another_process_are_found_without_a_new_start(tmp_path: Path, teacher_folder: Path) -> None:
    teacher, given = load(teacher_folder), batches(3)
    one, other = (open_cache(teacher, tmp_path / "cache") for _ in range(2))
    one(given[0])
    other(given[0])
    other(given[1])
    one(given[1])
    assert (one.hits, one.misses, other.hits, other.misses) == (1, 1, 1, 1), "each batch was computed and kept once"
    lines = [line for index in (tmp_path / "cache").glob("*.jsonl") for line in index.read_text().splitlines()]
    assert len({json.loads(line)["batch"] for line in lines}) == len(lines) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_each_cache_writes_parts_of_its_own(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    teacher, (one, two) = load(teacher_folder), batches(2)
    caches = [open_cache(teacher, tmp_path / "cache", said) for _ in range(2)]
    for cache, batch in ((caches[0], one), (caches[1], two), (caches[0], two), (caches[1], one)):
        assert_same(teacher(batch), cache(batch))
    assert not said
    assert [(cache.hits, cache.misses) for cache in caches] == [(1, 1), (1, 1)]
    assert len(list((tmp_path / "cache").rglob("part-*.bin"))) == 2
