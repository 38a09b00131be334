from __future__ import annotations

import re
import shutil
import threading
import time
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny_tokenizers import FAMILIES, make_text, saved
from transformers import AutoTokenizer

from engine.config.tools import PrepareConfig, SourceConfig
from engine.data.batch import Counts
from engine.data.grouping import WINDOW
from engine.data.loader import CorpusLoader, held_out_counts
from engine.data.manifest import load_manifest
from engine.data.prepare.corpus import prepare
from engine.data.share import StepShare
from engine.errors import UserError

EVAL = 13


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A corpus of two sources; the second has half a weight."""
    folder = tmp_path_factory.mktemp("loader")
    for number, documents in enumerate((60, 25)):
        (folder / f"{number}.txt").write_text(make_text(documents=documents, seed=number))
    sources = [SourceConfig(path=str(folder / "0.txt")), SourceConfig(path=str(folder / "1.txt"), weight=0.5)]
    prepare(
        PrepareConfig(
            sources=sources, output_dir=str(folder / "corpus"), tokenizer=saved("bert", folder), seq_len=40, workers=1
        )
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(home):
    return AutoTokenizer.from_pretrained(str(home / "tokenizer-bert"))


@pytest.fixture(scope="module")
def rows(home) -> list[tuple[int, ...]]:
    """All sequences, read by `datasets` rather than by the code under test."""
    folder = home / "corpus"
    shards = [Dataset.from_file(str(folder / entry.file)) for entry in load_manifest(folder).shards]
    return [tuple(row) for row in concatenate_datasets(shards)["input_ids"]]


@pytest.fixture
def make(home, tokenizer):
    def build(path: Path = home / "corpus", **options) -> CorpusLoader:
        share = StepShare(
            options.pop("global_batch", 8),
            options.pop("micro_batch", 8),
            rank=options.pop("rank", 0),
            world=options.pop("world", 1),
        )
        return CorpusLoader(path, share, **{"eval_sequences": EVAL, "seed": 7, "tokenizer": tokenizer, **options})

    return build


def sequences(batch) -> list[tuple[int, ...]]:
    """The real tokens of each row."""
    lengths = [batch.input_ids.shape[1]] * len(batch.input_ids)
    if batch.attention_mask is not None:
        lengths = batch.attention_mask.sum(1).tolist()
    return [tuple(row[:n].tolist()) for row, n in zip(batch.input_ids, lengths, strict=True)]


def test_rows_are_the_sequences_of_the_shards(make, rows, home):
    loader = make()
    first, second = (source.sequences for source in loader.manifest.sources)
    assert len(rows) == first + second
    held = held_out_counts([first, second], [1.0, 0.5], EVAL)
    train = set(rows[: first - held[0]] + rows[first : first + second - held[1]])
    want = rows[first - held[0] : first] + rows[first + second - held[1] :]
    assert min(held) > 0
    steps = -(-loader.order.slots // 8)
    seen = [s for step in range(steps) for batch in loader.step(step).micro for s in sequences(batch)]
    assert set(seen) <= train
    one_epoch = seen[: loader.order.slots]
    assert len(set(one_epoch)) == len(one_epoch)
    assert {s for b in loader.held_out_batches(4) for s in sequences(b)} == set(want)
    assert sum(len(sequences(b)) for b in loader.held_out_batches(4)) == EVAL


def test_a_step_does_not_depend_on_ranks_or_micro_batch(make):
    for step in (0, 1, 1000):
        want = [s for batch in make().step(step).micro for s in sequences(batch)]
        assert len(want) == 8
        for world, micro in [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (1, 4)]:
            parts = [
                make(rank=r, world=world, micro_batch=micro, eval_sequences=EVAL).step(step).micro for r in range(world)
            ]
            assert all(len(part) == 8 // (world * micro) for part in parts)
            in_order = [s for group in zip(*parts, strict=True) for batch in group for s in sequences(batch)]
            assert in_order == want


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"micro_batch": 2, "world": 2}])
def test_grouped_steps_have_one_length_and_lose_nothing(make, rows, options) -> None:
    """Windows of steps hold what the order of training gives them; ranks and micro batches change nothing."""
    world = options.get("world", 1)
    plain, single = make(), make(group_by_length=True)
    loaders = [make(group_by_length=True, rank=rank, **options) for rank in range(world)]
    for start, position in ((0, 0), (5, 40)):
        for one in (plain, single, *loaders):
            one.start_at(start, position)
        grouped, spread, ungrouped = [], [], []
        for step in range(start, start + WINDOW):
            batches = zip(*(one.step(step).micro for one in loaders), strict=True)
            got = [s for ranks in batches for batch in ranks for s in sequences(batch)]
            assert got == [s for batch in single.step(step).micro for s in sequences(batch)]
            numbers = [loaders[0].sequence_ids(step, micro, 0) for micro in range(len(loaders[0].step(step).micro))]
            assert [rows[at] for at in numbers[0]] == got[: len(numbers[0])]
            grouped += got
            spread.append(max(map(len, got)) - min(map(len, got)))
            ungrouped += [s for batch in plain.step(step).micro for s in sequences(batch)]
        assert sorted(grouped) == sorted(ungrouped)
        assert grouped != ungrouped
        lengths = [len(s) for s in grouped]
        assert sum(spread) <= max(lengths) - min(lengths)
        assert lengths != sorted(lengths)


def test_grouped_steps_can_be_taken_in_any_order(make) -> None:
    loader, other = make(group_by_length=True), make(group_by_length=True)
    far = [loader.step(step).micro[0].input_ids for step in (100, 3, 64)]
    for ids, step in zip(far, (100, 3, 64), strict=True):
        assert torch.equal(ids, other.step(step).micro[0].input_ids)


def test_batches_know_their_step_and_others_have_none(make):
    loader = make(rank=1, world=2, micro_batch=2)
    assert [batch.to(torch.device("cpu")).step for batch in loader.step(70).micro] == [70, 70]
    assert {batch.step for batch in (*loader.held_out_batches(4), *loader.first_batches(3))} == {None}


def test_masking_does_not_depend_on_ranks_or_micro_batch_either(make):
    def masked(**options) -> dict[tuple, tuple]:
        found = {}
        for batch in make(mlm_probability=0.3, whole_word=True, **options).step(3).micro:
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                original = torch.where(labels >= 0, labels, ids)
                found[tuple(original[original != 0].tolist())] = tuple(ids[ids != 0].tolist())
        return found

    whole = masked()
    split = {}
    for rank in range(2):
        split |= masked(micro_batch=2, world=2, rank=rank)
    assert whole == split
    assert any(a != b for a, b in whole.items())


def test_masks_change_with_the_epoch_but_not_between_evaluations(make):
    loader = make(mlm_probability=0.3)
    a, b = ([batch.input_ids for batch in loader.held_out_batches(4)] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first = make(mlm_probability=0.3, global_batch=1, micro_batch=1)
    order, slots = first.order, first.order.slots
    later = next(p for p in range(slots, 4 * slots) if order.indices(p) == order.indices(0))
    one, two = first.step(0).micro[0], first.step(later).micro[0]
    assert one.input_ids.shape == two.input_ids.shape
    assert not torch.equal(one.labels, two.labels)


def test_evaluation_masks_do_not_depend_on_ranks_or_batch_size(make):
    def masked(batch_size: int, world: int) -> dict[tuple, tuple]:
        found = {}
        for rank in range(world):
            loader = make(mlm_probability=0.3, rank=rank, world=world, micro_batch=1)
            for batch in loader.held_out_batches(batch_size):
                for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                    original = torch.where(labels >= 0, labels, ids)
                    found[tuple(original[original != 0].tolist())] = tuple(ids[ids != 0].tolist())
        return found

    assert masked(64, 1) == masked(1, 1) == masked(3, 2)


def test_padding_counts_and_types(make):
    loader = make(mlm_probability=0.15, micro_batch=2)
    got = loader.step(5)
    want = Counts()
    for batch in got.micro:
        lengths = [len(s) for s in sequences(batch)]
        longest = max(lengths)
        assert batch.input_ids.shape == (2, longest)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert (batch.attention_mask is None) == (min(lengths) == longest)
        if batch.attention_mask is not None:
            assert batch.attention_mask.dtype == torch.int64
            assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
        here = Counts(
            sequences=2,
            tokens=sum(lengths),
            token_pairs=sum(n * n for n in lengths),
            positions=2 * longest,
            position_pairs=2 * longest * longest,
            masked=int((batch.labels != -100).sum()),
        )
        assert batch.counts == here
        want = want + here
    assert got.local_counts == want
    assert any(batch.attention_mask is not None for batch in got.micro)


def test_without_padding_there_is_no_mask(make):
    loader = make(micro_batch=1)
    for batch in loader.step(0).micro:
        assert batch.attention_mask is None
        assert batch.labels is None
        assert batch.counts.masked == 0


@pytest.mark.parametrize(("count", "world"), [(13, 1), (13, 2), (13, 4), (8, 8), (9, 8), (2, 2), (3, 2)])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_evaluation_shares(make, count, world, batch_size):
    loaders = [make(eval_sequences=count, rank=r, world=world, micro_batch=1) for r in range(world)]
    parts = [list(loader.held_out_batches(batch_size)) for loader in loaders]
    assert len({len(part) for part in parts}) == 1
    sizes = [len(batch.input_ids) for part in parts for batch in part]
    assert min(sizes) >= 1
    assert max(sizes) <= max(2, batch_size)
    got = sorted(s for part in parts for batch in part for s in sequences(batch))
    whole = sorted(s for batch in make(eval_sequences=count).held_out_batches(64) for s in sequences(batch))
    assert got == whole
    assert len(got) == count


def test_no_evaluation(make):
    assert list(make(eval_sequences=0).held_out_batches(4)) == []


def test_steps_is_step_ahead_of_time_and_its_thread_ends(make):
    loader = make()
    before = threading.active_count()
    stream = loader.steps(3)
    for step in range(3, 8):
        item = next(stream)
        assert item.step == step
        for a, b in zip(item.micro, loader.step(step).micro, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
    assert threading.active_count() == before + 1
    assert loader.wait_s > 0
    stream.close()
    assert threading.active_count() == before
    waited = loader.wait_s
    time.sleep(0.05)
    assert loader.wait_s == waited


def test_prefetching_is_bounded(make, monkeypatch):
    made = []
    step = CorpusLoader.step
    monkeypatch.setattr(CorpusLoader, "step", lambda self, n: made.append(n) or step(self, n))
    stream = make().steps(0)
    next(stream)
    time.sleep(0.3)
    assert max(made) <= 3  # one consumed, two waiting, one in the producer's hands
    stream.close()


@pytest.mark.faults
def test_an_error_in_the_thread_reaches_the_consumer(home, make, tmp_path):
    path = tmp_path / "corpus"
    shutil.copytree(home / "corpus", path)
    for shard in path.glob("shard-*.arrow"):
        shard.write_bytes(b"\x00" * shard.stat().st_size)  # the right size, but not Arrow
    before = threading.active_count()
    stream = make(path=path).steps(0)
    with pytest.raises(UserError, match=r"shard-\d+\.arrow: unreadable shard"):
        next(stream)
    assert threading.active_count() == before


def overwritten(path: Path, old: np.ndarray, new: np.ndarray) -> None:
    data = path.read_bytes()
    assert data.count(old.tobytes()) == 1
    path.write_bytes(data.replace(old.tobytes(), new.astype(old.dtype).tobytes()))


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["ids", "offsets"])
def test_damage_that_is_no_sequence_names_the_shard(home, make, rows, tmp_path, damage):
    """Of the same size and still Arrow: without a check of the checksums, or before it comes there."""
    path = tmp_path / "corpus"
    shutil.copytree(home / "corpus", path)
    first = load_manifest(path).sources[0].sequences
    of_second = rows[first:]
    shard = path / load_manifest(path).shards[-1].file
    if damage == "ids":
        ids = np.array(of_second[1], np.uint16)
        overwritten(shard, ids, np.where(np.arange(len(ids)) == 3, 65_535, ids))
    else:
        ends = np.cumsum([len(row) for row in of_second]).astype(np.int32)
        overwritten(shard, ends, np.where(np.arange(len(ends)) == 1, ends[-1], ends))
    loader = make(path=path, eval_sequences=0, mlm_probability=0.15)
    said = rf"{re.escape(str(shard))}: sequence ({first + 1}|{first + 2}) of the corpus has no tokens, more than "
    with pytest.raises(UserError, match=said):
        list(takewhile(lambda batches: batches.step < 1000, loader.steps(0)))
    with pytest.raises(UserError, match=said):
        list(make(path=path, eval_sequences=len(rows) - 2).held_out_batches(4))


def test_opening_reads_no_shard(home, make, tmp_path):
    path = tmp_path / "corpus"
    shutil.copytree(home / "corpus", path)
    for shard in path.glob("shard-*.arrow"):
        shard.unlink()
    make(path=path)


@pytest.mark.faults
def test_missing_and_truncated_shards(home, make, tmp_path):
    path = tmp_path / "corpus"
    shutil.copytree(home / "corpus", path)
    shard = path / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    everything = np.arange(len(make()._store))
    with pytest.raises(UserError, match=r"shard-00001\.arrow: has \d+ bytes, the manifest says"):
        make(path=path)._store.rows(everything)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow: missing shard"):
        make(path=path)._store.rows(everything)


def test_only_so_many_shards_are_mapped_at_once(make, monkeypatch):
    everything = np.arange(len(make()._store))[::-1]
    want = make()._store.rows(everything)
    monkeypatch.setattr("engine.data.shards.MOST_MAPPED", 1)
    store = make()._store
    for row, wanted in zip(store.rows(everything), want, strict=True):  # rows of shards that are mapped no more, too
        assert np.array_equal(row, wanted)
    assert len(store._open) == 1


def test_a_shard_with_other_sequences_than_the_manifest_says(home, make, tmp_path):
    path = tmp_path / "corpus"
    shutil.copytree(home / "corpus", path)
    text = (path / "manifest.json").read_text()
    count = load_manifest(path).shards[0].sequences
    (path / "manifest.json").write_text(text.replace(f'"sequences": {count}', f'"sequences": {count + 1}'))
    loader = make(path=path)
    with pytest.raises(UserError, match=rf"{count} sequences, the manifest says {count + 1}"):
        next(loader.held_out_batches(EVAL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 128}, r"data\.seq_len=128: .*prepared with 40"),
        ({"eval_sequences": 10**6}, r"data\.eval_sequences=1000000: .*hold out at most"),
        ({"eval_sequences": 2, "world": 4, "micro_batch": 2}, r"data\.eval_sequences=2: .*4 ranks"),
    ],
)
def test_errors_name_the_key(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.faults
def test_another_tokenizer_is_refused(make):
    with pytest.raises(UserError, match="tokenised with"):
        make(tokenizer=FAMILIES["roberta"]())


def test_held_out_counts():
    assert held_out_counts([100, 100], [1.0, 1.0], 10) == [5, 5]
    assert held_out_counts([100, 100], [3.0, 1.0], 10) == [8, 2]
    assert held_out_counts([1, 1000], [1.0, 1.0], 10) == [0, 10]
    assert held_out_counts([3, 3], [1000.0, 1.0], 4) == [2, 2]
    assert sum(held_out_counts([10, 20, 30], [0.3, 0.3, 0.4], 17)) == 17
    with pytest.raises(UserError, match="hold out at most 4"):
        held_out_counts([3, 3], [1.0, 1.0], 5)


def test_many_shards_need_few_file_handles(make, rows):
    loader = make()
    held = np.arange(len(rows))
    loader._store.rows(held)
    names = {str(path.resolve()) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    assert not [name for name in names if "shard-" in name]
