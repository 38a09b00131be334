from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, make_text
from tokenizers import Tokenizer

from engine.config import PrepareConfig
from engine.data import packing
from engine.data.packing import Packer, SpecialTokens, blocks, sentence_starts, special_tokens, tokenize
from engine.data.units import WorkUnit, pack_unit, plain_tokenizer, unit_settings

SEP = 999


def sentences(text: str) -> list[str]:
    starts = [0, *sentence_starts(text)]
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("A 3.5 rise, e.g. this one. 7 more.", ["A 3.5 rise, e.g. this one.", "7 more."]),
        ('He said "Go." "No," she said. (Yes.) End', ['He said "Go."', '"No," she said.', "(Yes.)", "End"]),
        ("今日は。元気？はい！", ["今日は。", "元気？", "はい！"]),
        ("Это да. Нет.", ["Это да.", "Нет."]),
        ("कैसे हो। अच्छा", ["कैसे हो।", "अच्छा"]),
        ("no end mark", ["no end mark"]),
        ("Ends. ", ["Ends."]),
    ],
)
def test_sentence_rule(text, want):
    assert sentences(text) == want


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["Word. ", "word ", "x" * 30, "。", ".  ", "A"]), max_size=60), st.integers(5, 60))
def test_blocks_hold_the_whole_text_once(parts, limit):
    text = "".join(parts).strip()
    before = packing._BLOCK
    packing._BLOCK = limit
    try:
        found = blocks(text)
    finally:
        packing._BLOCK = before
    assert "".join(block.text for block in found) == text
    assert found[0].opens
    # each sentence is accounted for once: inside a block, or as the one that opens it
    assert sum(len(block.starts) + block.opens for block in found) == 1 + len(sentence_starts(text))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [40, 8192])
def test_token_units_are_the_ids_of_the_running_text(family, block, monkeypatch):
    """Cutting into sentences, and long lines into blocks, does not change how the text is tokenised."""
    monkeypatch.setattr(packing, "_BLOCK", block)
    monkeypatch.setattr(packing, "_BATCH", 500)
    backend = plain_tokenizer(FAMILIES[family]().backend_tokenizer.to_str())
    documents = [text.split("\n") for text in make_text(documents=12).split("\n\n")]
    found = list(tokenize(backend, documents, SpecialTokens((), (), None)))
    assert [len(document) for document in found] == [len(document) for document in documents]
    for document, paragraphs in zip(documents, found, strict=True):
        for text, units in zip(document, paragraphs, strict=True):
            assert np.concatenate(units).tolist() == backend.encode(text, add_special_tokens=False).ids
            assert len(units) == len(sentences(text))
            assert [backend.decode(unit.tolist()).strip().lower().replace(" ", "") for unit in units] == [
                sentence.lower().replace(" ", "") for sentence in sentences(text)
            ]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_the_tokenizers_own(family):
    tokenizer = FAMILIES[family]()
    backend = plain_tokenizer(tokenizer.backend_tokenizer.to_str())
    special = special_tokens(backend, tokenizer.sep_token_id)
    text = "The school of music."
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*special.prefix, *plain, *special.suffix] == tokenizer(text)["input_ids"]
    assert special.prefix == (tokenizer.cls_token_id,)
    assert special.suffix == (tokenizer.sep_token_id,)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_files_that_truncate_or_pad_and_special_words_in_the_text(family):
    tokenizer = FAMILIES[family]()
    with_settings = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    with_settings.enable_truncation(4)
    with_settings.enable_padding(length=64)
    text = f"school {tokenizer.sep_token} of{tokenizer.mask_token}music and history"
    settings_ = unit_settings(PrepareConfig(seq_len=64, min_tokens=1), tokenizer)
    (ids,) = pack_unit(plain_tokenizer(with_settings.to_str()), WorkUnit(0, text.encode()), settings_).sequences
    assert len(ids) > 5
    assert not set(ids.tolist()) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def packer(**options) -> Packer:
    defaults = {"capacity": 10, "pack": "contiguous", "unit": "sentence", "separator": SEP}
    return Packer(**{**defaults, "rng": np.random.default_rng(0), **options})


def document(*paragraphs: list[int], start: int = 0) -> list[list[np.ndarray]]:
    """Paragraphs of sentences of the given lengths; the ids count up from `start`."""
    found = []
    for lengths in paragraphs:
        found.append([])
        for length in lengths:
            found[-1].append(np.arange(start, start + length, dtype=np.int32))
            start += length
    return found


def packed(documents, **options) -> list[list[int]]:
    worker = packer(**options)
    for entry in documents:
        worker.add_document(entry)
    worker.finish()
    return [sequence.tolist() for sequence in worker.sequences]


def span(a: int, b: int) -> list[int]:
    return list(range(a, b))


def test_sentences_are_not_cut():
    assert packed([document([4, 4, 4], [6])]) == [span(0, 8), span(8, 18)]


def test_paragraphs_are_not_cut_unless_longer_than_a_sequence():
    assert packed([document([4], [4, 3], [2])], unit="paragraph") == [span(0, 4), span(4, 13)]
    assert packed([document([2], [6, 7])], unit="paragraph") == [span(0, 8), span(8, 15)]


def test_a_sentence_longer_than_a_sequence_is_cut_into_runs():
    assert packed([document([3, 25, 2])]) == [span(0, 10), span(10, 20), span(20, 30)]


def test_contiguous_goes_on_with_a_separator_and_document_does_not():
    two = [document([4]), document([4], start=100)]
    assert packed(two) == [[*span(0, 4), SEP, *span(100, 104)]]
    assert packed(two, separator=None) == [[*span(0, 4), *span(100, 104)]]
    assert packed(two, pack="document") == [span(0, 4), span(100, 104)]


def test_no_separator_at_either_end():
    two = [document([6]), document([4], start=100)]  # 6 + separator + 4 is one too many
    assert packed(two) == [span(0, 6), span(100, 104)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(2, 12))
def test_token_runs_are_full_and_lose_nothing(lengths, capacity):
    documents = [document(sizes, start=1000 * (i + 1)) for i, sizes in enumerate(lengths)]
    found = packed(documents, unit="token", capacity=capacity)
    assert all(len(sequence) == capacity for sequence in found[:-1])
    text = [i for entry in documents for paragraph in entry for sentence in paragraph for i in sentence.tolist()]
    assert [i for sequence in found for i in sequence if i != SEP] == text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=6
    ),
    st.sampled_from(["sentence", "paragraph", "token"]),
    st.sampled_from(["document", "contiguous"]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_nothing_is_lost_repeated_or_too_long(lengths, unit, pack, short):
    documents = [document(*paragraphs, start=1000 * (i + 1)) for i, paragraphs in enumerate(lengths)]
    found = packed(documents, unit=unit, pack=pack, short_seq_prob=short)
    text = [i for entry in documents for paragraph in entry for sentence in paragraph for i in sentence.tolist()]
    assert [i for sequence in found for i in sequence if i != SEP] == text
    assert max(map(len, found)) <= 10
    if pack == "document":
        assert all(len({i // 1000 for i in sequence}) == 1 for sequence in found)
    for sequence in found:
        assert sequence[0] != SEP


def test_short_sequences():
    documents = [document([1] * 40_000)]
    found = [len(s) for s in packed(documents, short_seq_prob=0.3)]
    short = sum(length < 10 for length in found) / len(found)
    assert 0.3 * 8 / 9 - 0.02 < short < 0.3 * 8 / 9 + 0.02  # an aim of 10 out of 2..10 is not short
    assert min(found[:-1]) == 2
    assert set(found[:-1]) == set(range(2, 11))
    assert min(len(s) for s in packed(documents, short_seq_prob=1.0, min_tokens=6)) >= 6


def test_sequences_under_min_tokens_are_dropped_and_counted():
    worker = packer(pack="document", min_tokens=3)
    for length in (2, 3, 9):
        worker.add_document(document([length]))
    worker.finish()
    assert [len(s) for s in worker.sequences] == [3, 9]
    assert worker.dropped == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_unit_reads_like_the_text(family):
    tokenizer = FAMILIES[family]()
    text = make_text(documents=20)
    settings_ = unit_settings(PrepareConfig(seq_len=48, min_tokens=1), tokenizer)
    worker = pack_unit(plain_tokenizer(tokenizer.backend_tokenizer.to_str()), WorkUnit(0, text.encode()), settings_)
    ids = np.concatenate(worker.sequences)
    decoded = tokenizer.decode(ids[ids != tokenizer.sep_token_id].tolist())
    assert "".join(decoded.lower().split()) == "".join(text.lower().split())
    assert max(map(len, worker.sequences)) <= 46
    assert sum(int((s == tokenizer.sep_token_id).sum()) for s in worker.sequences) > 5
