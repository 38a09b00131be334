"""Tokenising the texts of a task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.data.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_PER_CALL = 4096  # enough for the tokenizer's threads, while the Python lists of one call stay small


def encode_split(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32] | None = None,
) -> Encoded:
    """Texts, or pairs of texts, as token ids with the tokenizer's special tokens, at most seq_len of them: of a pair
    that is too long, the longer text loses tokens first. Token types come with tokenizers whose models take them.
    `targets` is passed on as it is."""
    assert second is None or len(second) == len(first), (len(first), len(second or ()))
    assert targets is None or len(targets) == len(first), (len(first), len(targets))
    typed = "token_type_ids" in tokenizer.model_input_names
    lengths: list[int] = []
    ids, types = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)]  # so that a split without rows can be joined, too
    for begin in range(0, len(first), _ROWS_PER_CALL):
        chunk = slice(begin, begin + _ROWS_PER_CALL)
        found = tokenizer(
            list(first[chunk]),
            None if second is None else list(second[chunk]),
            truncation="longest_first",
            max_length=seq_len,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=typed,
        )
        lengths += map(len, found["input_ids"])
        ids.append(_flat(found["input_ids"], np.int32))
        if typed:
            types.append(_flat(found["token_type_ids"], np.int8))
    starts = np.zeros(len(first) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return Encoded(np.concatenate(ids), starts, np.concatenate(types) if typed else None, targets)


def _flat(rows: list[list[int]], dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype)
