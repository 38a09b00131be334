"""Task rows as token ids: a split, and a whole task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.tasks.load import TaskData
from engine.tasks.rows import Encoded, Split
from engine.tasks.specs import TaskSpec
from engine.tasks.squad import SquadSplit, Windows, encode_squad

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
    """Returns n texts, or pairs of texts, as token ids with the tokenizer's special tokens, at most seq_len of them.

    A pair that is too long loses tokens of its longer text first. Token types come with tokenizers whose models take
    them. targets: (n,), passed on as they are.
    """
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


@dataclass(frozen=True)
class EncodedTask:
    spec: TaskSpec
    train: Encoded
    """Rows, or the windows of a span task."""
    parts: Mapping[str, Encoded | Windows]
    """Every dev split, and the test splits that were loaded, by name."""
    splits: Mapping[str, Split | SquadSplit]
    """The texts, labels and ids behind `parts`."""
    pad_id: int

    def rows(self, split: str) -> Encoded:
        """Returns the token ids of a dev or test split."""
        part = self.parts[split]
        return part.encoded if isinstance(part, Windows) else part

    @property
    def mean_tokens(self) -> float:
        """Tokens of a training row, on average."""
        return float(self.train.lengths.mean())


def encode_task(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, doc_stride: int = 128
) -> EncodedTask:
    """Encodes all splits. Raises UserError where windows of a span task would not overlap. The tokenizer must have a
    pad token."""
    parts: dict[str, Encoded | Windows] = {}
    texts: dict[str, Split | SquadSplit] = {}
    for name, split in data.splits.items():
        if isinstance(split, SquadSplit):
            parts[name] = encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=doc_stride)
        else:
            assert isinstance(split, Split), name
            parts[name] = encode_split(split.first, split.second, tokenizer, seq_len=seq_len, targets=split.labels)
        texts[name] = split
    train = parts.pop("train")
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int), pad_id
    return EncodedTask(
        spec=data.spec,
        train=train.encoded if isinstance(train, Windows) else train,
        parts=parts,
        splits={name: texts[name] for name in parts},
        pad_id=pad_id,
    )
