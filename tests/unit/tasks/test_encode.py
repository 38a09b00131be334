from __future__ import annotations

import numpy as np
import pytest
from tiny_tokenizers import FAMILIES, bert, make_text
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from engine.tasks.encode import encode_split

TEXTS = [line for line in make_text(documents=12, seed=5).splitlines() if line]
PAIRS = TEXTS[1:] + TEXTS[:1]


@pytest.fixture(scope="module")
def typed() -> PreTrainedTokenizerFast:
    """A tokenizer of a model with token types, saved with padding and truncation switched on, as all-MiniLM-L6-v2's."""
    tokenizer = Tokenizer.from_str(bert().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(30)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def rows(encoded, values) -> list[list[int]]:
    return [part.tolist() for part in np.split(values, encoded.starts[1:-1])]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_the_tokenizer_gives_for_each(family, pairs):
    tokenizer = FAMILIES[family]()
    got = encode_split(TEXTS, PAIRS if pairs else None, tokenizer, seq_len=10_000)
    want = [tokenizer(*both)["input_ids"] for both in (zip(TEXTS, PAIRS, strict=True) if pairs else zip(TEXTS))]
    assert rows(got, got.ids) == want
    assert got.lengths.tolist() == [len(row) for row in want]
    assert (got.ids.dtype, got.starts.dtype) == (np.int32, np.int64)
    assert (got.types is not None) == (family == "deberta_v3"), "whose tokenizer gives token types"


def test_more_rows_than_one_call_takes():
    texts = [f"{i} the river" for i in range(9001)]
    pairs = [f"school {i}" for i in reversed(range(9001))]
    got = encode_split(texts, pairs, bert(), seq_len=64)
    found = rows(got, got.ids)
    assert len(got) == 9001
    for i in (0, 1, 4095, 4096, 4097, 8191, 8192, 9000):
        assert found[i] == bert()(texts[i], pairs[i])["input_ids"]


def test_single_texts_are_cut():
    whole, cut = (encode_split(TEXTS, None, bert(), seq_len=n) for n in (10_000, 16))
    assert whole.lengths.max() > 16
    for before, after in zip(rows(whole, whole.ids), rows(cut, cut.ids), strict=True):
        assert after == (before if len(before) <= 16 else [*before[:15], 3])  # [SEP] stays


def test_of_a_pair_the_longer_text_is_cut():
    long, short = TEXTS[0] * 5, "river"
    few = bert()(short, add_special_tokens=False)["input_ids"]
    many = bert()(long, add_special_tokens=False)["input_ids"]
    got = encode_split([long, short], [short, long], bert(), seq_len=20)
    room = 20 - 3 - len(few)
    assert rows(got, got.ids) == [[2, *many[:room], 3, *few, 3], [2, *few, 3, *many[:room], 3]]


def test_token_types_and_no_padding(typed):
    got = encode_split(TEXTS, PAIRS, typed, seq_len=10_000)
    assert got.types is not None
    assert got.types.dtype == np.int8
    for ids, types in zip(rows(got, got.ids), rows(got, got.types), strict=True):
        first = ids.index(3) + 1
        assert types == [0] * first + [1] * (len(ids) - first)
        assert typed.pad_token_id not in ids
    assert got.lengths.max() > 30  # the saved truncation does not count
    single = encode_split(TEXTS, None, typed, seq_len=20)
    assert len(single.types) == len(single.ids)
    assert not single.types.any()


def test_empty_texts_and_no_rows(typed):
    assert rows(got := encode_split(["", "river", ""], None, typed, seq_len=20), got.ids)[::2] == [[2, 3], [2, 3]]
    both = encode_split(["", "river"], ["", ""], typed, seq_len=20)
    assert rows(both, both.ids)[0] == [2, 3, 3]
    assert rows(both, both.types)[0] == [0, 0, 1]
    none = encode_split([], None, typed, seq_len=20)
    assert (len(none), none.ids.size, none.types.size) == (0, 0, 0)


def test_targets_go_along():
    targets = np.arange(len(TEXTS), dtype=np.float32)
    assert encode_split(TEXTS, None, bert(), seq_len=20, targets=targets).targets is targets
    assert encode_split(TEXTS, None, bert(), seq_len=20).targets is None
    with pytest.raises(AssertionError):
        encode_split(TEXTS, None, bert(), seq_len=20, targets=targets[1:])
    with pytest.raises(AssertionError):
        encode_split(TEXTS, PAIRS[1:], bert(), seq_len=20)
