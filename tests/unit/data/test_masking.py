from __future__ import annotations

import numpy as np
import pytest
from tiny_tokenizers import FAMILIES, bert, make_text
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.data.masking import MaskingTables, mask_tokens
from engine.errors import UserError
from engine.kernels.inputs import UNSCORED_LABEL


def batch(tokenizer, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    texts = make_text(documents=rows, paragraphs=1, seed=5).split("\n\n")
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=60)
    return np.array(encoded["input_ids"]), np.array(encoded["attention_mask"])


def mask(ids, attention, tables, **options):
    defaults = {"probability": 0.15, "whole_word": False, "seed": 1}
    return mask_tokens(ids, attention, np.arange(len(ids)), tables=tables, **{**defaults, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole_word", [False, True])
def test_shares_and_labels(family, whole_word):
    tokenizer = FAMILIES[family]()
    tables = MaskingTables.from_tokenizer(tokenizer)
    ids, attention = batch(tokenizer, rows=600)
    before = ids.copy()
    masked, labels = mask(ids, attention, tables, whole_word=whole_word)
    assert (ids == before).all()
    chosen = labels != UNSCORED_LABEL
    special = np.isin(ids, tokenizer.all_special_ids)
    assert not (chosen & special).any()
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()
    assert abs(chosen.sum() / (~special).sum() - 0.15) < 0.02
    is_mask, kept = masked[chosen] == tokenizer.mask_token_id, masked[chosen] == ids[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.03
    assert abs(kept.mean() - 0.1) < 0.03
    assert not np.isin(masked[chosen][~is_mask], tokenizer.all_special_ids).any()
    assert chosen.any(axis=1).all()


def test_a_row_depends_on_its_sample_id_and_seed_only():
    tables = MaskingTables.from_tokenizer(bert())
    ids, attention = batch(bert(), rows=8)
    args = {"probability": 0.3, "whole_word": True, "tables": tables}
    whole = mask_tokens(ids, attention, np.arange(8), seed=1, **args)
    length = int(attention[3].sum())
    alone = mask_tokens(ids[3:4, :length], None, [3], seed=1, **args)  # no neighbours, no padding
    for a, b in zip(whole, alone, strict=True):
        assert (a[3, :length] == b[0]).all()
    for other in (
        mask_tokens(ids, attention, np.arange(8), seed=2, **args),
        mask_tokens(ids, attention, np.arange(8) + 100, seed=1, **args),
    ):
        assert not (other[1] == whole[1]).all()


@pytest.mark.parametrize(("family", "marker"), [("bert", "##"), ("roberta", "Ġ"), ("xlm_r", "▁"), ("deberta_v3", "▁")])
def test_whole_words_are_chosen_together(family, marker):
    tokenizer = FAMILIES[family]()
    ids, attention = batch(tokenizer)
    _, labels = mask(ids, attention, MaskingTables.from_tokenizer(tokenizer), whole_word=True)
    several = 0
    for row, row_labels in zip(ids, labels, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(row.tolist())
        for at in range(2, len(tokens)):
            if row[at] in tokenizer.all_special_ids or row[at - 1] in tokenizer.all_special_ids:
                continue
            goes_on = tokens[at].startswith(marker) if marker == "##" else not tokens[at].startswith(marker)
            if goes_on:
                assert (row_labels[at] == UNSCORED_LABEL) == (row_labels[at - 1] == UNSCORED_LABEL)
                several += row_labels[at] != UNSCORED_LABEL
    assert several > 20


def test_single_token_masking_does_split_words():
    """The counterpart of the test above: without the option a word can be chosen in part."""
    tokenizer = bert()
    ids, attention = batch(tokenizer)
    _, labels = mask(ids, attention, MaskingTables.from_tokenizer(tokenizer))
    continuation = MaskingTables.from_tokenizer(tokenizer).continuation[ids[:, 1:]]
    assert (((labels[:, 1:] == UNSCORED_LABEL) != (labels[:, :-1] == UNSCORED_LABEL)) & continuation).any()


def test_at_least_one_and_never_a_special_token():
    tokenizer = bert()
    ids = np.array([[tokenizer.cls_token_id, 20, 21, tokenizer.sep_token_id]] * 50)
    _, labels = mask(ids, None, MaskingTables.from_tokenizer(tokenizer), probability=1e-9)
    assert ((labels != UNSCORED_LABEL).sum(axis=1) == 1).all()
    only_special = np.array([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    masked, labels = mask(only_special, None, MaskingTables.from_tokenizer(tokenizer), probability=0.9)
    assert (masked == only_special).all()
    assert (labels == UNSCORED_LABEL).all()


def test_the_rest_of_a_cut_word_is_a_word_of_its_own():
    """A sequence may begin inside a word: what follows a special token is not joined to the next word."""
    tokenizer = bert()
    tables = MaskingTables.from_tokenizer(tokenizer)
    rest = int(np.flatnonzero(tables.continuation)[0])
    word = int(tables.ordinary[~tables.continuation[tables.ordinary]][0])
    ids = np.array([[tokenizer.cls_token_id, rest, word, tokenizer.sep_token_id]] * 50)
    _, labels = mask(ids, None, tables, probability=1e-9, whole_word=True)
    assert ((labels != UNSCORED_LABEL).sum(axis=1) == 1).all()


def test_a_tokenizer_without_mask_token():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"data\.mlm_probability: .*no mask token"):
        MaskingTables.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def test_whole_words_need_a_tokenizer_that_marks_them():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "[MASK]": 2}, unk_token="[UNK]"))
    tables = MaskingTables.from_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
    )
    assert tables.continuation is None
    with pytest.raises(UserError, match=r"data\.whole_word_mask"):
        mask(np.zeros((1, 3), dtype=np.int64), None, tables, whole_word=True)
