"""Damage that a corpus can suffer between its preparation and its use. Real files, real bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT
from tiny_world import TinyWorld, write_text

from engine.config.tools import PrepareConfig, SourceConfig
from engine.data.manifest import Manifest, load_manifest
from engine.data.prepare.corpus import prepare
from engine.data.shard_check import ShardCheck, share_of_this_host
from engine.data.shards import SequenceStore
from engine.errors import UserError

pytestmark = pytest.mark.faults


def settings(tiny_world: TinyWorld, folder: Path) -> PrepareConfig:
    return PrepareConfig(
        sources=[SourceConfig(path=str(folder / f"{name}.txt")) for name in "abc"],
        output_dir=str(folder / "corpus"),
        tokenizer=str(tiny_world.teacher),
        seq_len=16,
        min_tokens=2,
        workers=1,
    )


@pytest.fixture(scope="module")
def prepared(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    """Three shards, one of each text."""
    folder = tmp_path_factory.mktemp("three texts")
    for seed, name in enumerate("abc"):
        write_text(folder / f"{name}.txt", 40, seed=seed)
    config = settings(tiny_world, folder)
    assert len(prepare(config).shards) == 3
    return config


@pytest.fixture
def corpus(prepared: PrepareConfig, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.output_dir, tmp_path / "corpus"))


def problems(corpus: Path, parts: int = 2) -> list[str]:
    """What the ranks of a host say."""
    found = []
    manifest = load_manifest(corpus)
    for part in range(parts):
        check = ShardCheck(corpus, manifest, part=part, parts=parts)
        try:
            check.settle()
        except UserError as error:
            found.append(str(error))
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_corpus_passes(corpus: Path) -> None:
    for parts in (1, 2, 3, 5):
        assert problems(corpus, parts) == []


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_is_named(corpus: Path, shard: int, where: float) -> None:
    path = corpus / f"shard-0000{shard}.arrow"
    flip(path, round(where * (path.stat().st_size - 1)))
    (said,) = problems(corpus)
    assert said.startswith(f"{path}: its bytes have changed since it was written (sha256 ")
    assert "copy it again, or delete it and start python launch/prepare_data.py again" in said


def test_a_truncated_a_missing_and_an_unreadable_shard_are_named(corpus: Path) -> None:
    path = corpus / "shard-00002.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert problems(corpus)[0].startswith(f"{path}: has {len(whole) - 1} bytes, the manifest says {len(whole)}")
    path.unlink()
    assert problems(corpus)[0].startswith(f"{path}: missing shard; start python launch/prepare_data.py again")
    path.symlink_to(path)  # a loop: root may read what chmod forbids
    assert problems(corpus)[0].startswith(f"{path}: cannot be read (Too many levels")


def test_exchanged_shards_are_named(corpus: Path, tmp_path: Path) -> None:
    manifest = load_manifest(corpus)
    a, b = corpus / "shard-00000.arrow", corpus / "shard-00001.arrow"
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)
    said = problems(corpus)
    if manifest.shards[0].size == manifest.shards[1].size:
        assert f"{a}: holds what belongs in shard-00001.arrow" in said[0]
        assert f"{b}: holds what belongs in shard-00000.arrow" in said[1]
    else:  # the sizes tell already
        assert [text.partition(":")[0] for text in said] == [str(a), str(b)]


def test_one_shard_in_the_place_of_another_of_the_same_size(corpus: Path) -> None:
    a, b = corpus / "shard-00000.arrow", corpus / "shard-00001.arrow"
    size = min(a.stat().st_size, b.stat().st_size)
    manifest = with_cut_shards(corpus, size)
    shutil.copyfile(a, b)
    check = ShardCheck(corpus, manifest)
    with pytest.raises(UserError, match=r"shard-00001\.arrow: holds what belongs in shard-00000\.arrow \(sha256"):
        check.settle()


def with_cut_shards(corpus: Path, size: int) -> Manifest:
    """All shards cut to one size, and a manifest that says so: the check does not look inside."""
    manifest = load_manifest(corpus)
    entries = []
    for entry in manifest.shards:
        path = corpus / entry.file
        path.write_bytes(path.read_bytes()[:size])
        entries.append(replace(entry, size=size, sha256=sha256(path.read_bytes()).hexdigest()))
    return replace(manifest, shards=entries)


def test_the_remedy_works(prepared: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Path(prepared.output_dir)
    path = corpus / "shard-00001.arrow"
    whole = path.read_bytes()
    flip(path, len(whole) // 2)
    assert len(problems(corpus)) == 1
    path.unlink()
    prepare(prepared)
    assert path.read_bytes() == whole
    assert problems(corpus) == []


def test_every_shard_is_checked_once_by_the_ranks_of_a_host(corpus: Path) -> None:
    """With one of three shards damaged, exactly one of the ranks says so, whatever their number."""
    flip(corpus / "shard-00001.arrow", 100)
    for parts in (1, 2, 3, 4):
        assert len(problems(corpus, parts)) == 1


def test_the_share_of_a_host() -> None:
    assert share_of_this_host({}) == (0, 1)
    assert share_of_this_host({"LOCAL_RANK": "3", "LOCAL_SIZE": "8"}) == (3, 8)
    assert share_of_this_host({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (1, 4), "torchrun"
    assert share_of_this_host({"LOCAL_RANK": "2"}) == (2, 3)  # nobody said how many there are


def test_a_start_does_not_wait_for_a_slow_disk(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.shard_check.SETTLE_S", 0.2)
    manifest = load_manifest(corpus)
    pipe = corpus / "shard-00003.arrow"
    os.mkfifo(pipe)  # nothing comes out of it until somebody writes
    check = ShardCheck(corpus, replace(manifest, shards=[replace(manifest.shards[0], file=pipe.name, size=0)]))
    began = time.monotonic()
    check.settle()
    assert time.monotonic() - began < 0.6
    for _ in range(20):
        check.before_step()
    pipe.write_text("other bytes")
    with pytest.raises(UserError, match=r"shard-00003\.arrow: its bytes have changed"):
        steps_until_it_is_found(check)


def steps_until_it_is_found(check: ShardCheck) -> None:
    for _ in range(1000):
        check.before_step()
        time.sleep(0.02)


RANK = """
import os
import sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from engine.data.loader import CorpusLoader
from engine.data.manifest import load_manifest
from engine.data.shard_check import ShardCheck
from engine.data.share import StepShare
from engine.errors import UserError

rank, corpus, tokenizer, store = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
loader = CorpusLoader(
    corpus,
    StepShare(2, 1, rank=rank, world=2),
    tokenizer=AutoTokenizer.from_pretrained(tokenizer),
    eval_sequences=0,
    seed=0,
    check=ShardCheck(Path(corpus), load_manifest(corpus), part=rank, parts=2),
)
try:
    for batches in loader.steps(0):
        assert batches.step < loader.order.slots
except UserError as error:
    print(f"after step {batches.step}: {error}", flush=True)
os._exit(0)  # as ranks end, for the reason that engine/ranks/exit.py gives
"""


def test_damage_that_training_meets_before_the_check_is_told_to_all_ranks(
    corpus: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """Each rank's check is still busy with a pipe, where one of them reads ids that are none."""
    manifest = load_manifest(corpus)
    slow = [replace(manifest.shards[0], file=f"pipe-{rank}", sequences=0, tokens=0, size=0) for rank in range(2)]
    for entry in slow:
        os.mkfifo(corpus / entry.file)
    damaged = corpus / "shard-00002.arrow"
    ids = np.array(SequenceStore(corpus, manifest).rows([manifest.sequences - 1])[0])
    data = damaged.read_bytes()
    damaged.write_bytes(data.replace(ids.tobytes(), np.full_like(ids, 60_000).tobytes()))
    replace(manifest, shards=[*slow, *manifest.shards]).write(corpus)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(corpus), str(tiny_world.teacher), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said[0] == said[1]
    assert f": {damaged}: sequence " in said[0]
    assert [rank.returncode for rank in ranks] == [0, 0]
