"""A task as token ids: tokenised once, shared by every fine-tuning on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.encoding import Encoded
from engine.data.squad import SquadSplit, Windows, encode_squad
from engine.data.task_encoding import encode_split
from engine.data.task_specs import TaskSpec
from engine.data.tasks import Split, TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        """The token ids of a dev or test split."""
        part = self.parts[split]
        return part.encoded if isinstance(part, Windows) else part

    @property
    def mean_tokens(self) -> float:
        """Tokens of a training row, on average."""
        return float(self.train.lengths.mean())


def encode_task(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, doc_stride: int = 128
) -> EncodedTask:
    """Raises UserError where windows of a span task would not overlap. The tokenizer must have a pad token."""
    parts: dict[str, Encoded | Windows] = {}
    for name, split in data.splits.items():
        if isinstance(split, SquadSplit):
            parts[name] = encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=doc_stride)
        else:
            parts[name] = encode_split(split.first, split.second, tokenizer, seq_len=seq_len, targets=split.labels)
    train = parts.pop("train")
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int), pad_id
    return EncodedTask(
        spec=data.spec,
        train=train.encoded if isinstance(train, Windows) else train,
        parts=parts,
        splits={name: data.splits[name] for name in parts},
        pad_id=pad_id,
    )
