"""The texts of tasks as one table, the features that a model makes of them, and the scores that need no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.data.batch import Batch
from engine.models.pooling import pool
from engine.ranks import watchdog
from engine.ranks.collectives import gather_rows
from engine.ranks.runtime import Runtime
from engine.tasks.beir import RetrievalSplit
from engine.tasks.encode import encode_split
from engine.tasks.load import TaskData
from engine.tasks.loader import evaluation_batches
from engine.tasks.metrics import score_task
from engine.tasks.probe import ProbeFeatures, probe_outputs
from engine.tasks.retrieval import retrieval_metrics
from engine.tasks.rows import Split
from engine.tasks.specs import TaskSpec
from engine.tasks.vectors import Role, TextVectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 64
"""Texts in a forward pass of each rank."""

Hidden = Callable[[Batch, frozenset[int]], tuple[torch.Tensor, ...]]
"""Returns the hidden states of these layers (0: embeddings) in their order, (B, L, D) each."""
ScoredSplit = Split | RetrievalSplit


@dataclass(frozen=True)
class _Part:
    """Where the texts of a split lie in the table."""

    spec: TaskSpec
    first: slice
    """First texts of the rows, or queries."""
    second: slice | None
    """Second texts, or the corpus."""


@dataclass(frozen=True)
class TextFeatures:
    """What a model makes of the texts of a table, on the CPU."""

    parts: Mapping[str, _Part]
    means: torch.Tensor
    """(texts, layers, D) float32 means over the tokens."""
    vectors: torch.Tensor
    """(texts, V) float32 vectors for cosines."""

    def part(self, name: str) -> ProbeFeatures:
        """Returns the features of a split: the vectors of a zero-shot task; means of the last layer, or of all, for a
        probe."""
        part = self.parts[name]
        if part.spec.is_zero_shot:
            rows = self.vectors
        else:
            rows = (self.means if part.spec.every_layer else self.means[:, -1:]).flatten(1)
        return ProbeFeatures(rows[part.first], None if part.second is None else rows[part.second])


class TaskTexts:
    """The texts of one split of each task, tokenised once."""

    def __init__(
        self,
        splits: Mapping[str, tuple[TaskSpec, ScoredSplit]],
        tokenizer: PreTrainedTokenizerBase,
        vectors: TextVectors,
        *,
        seq_len: int,
    ) -> None:
        """splits: the split of each part, with its task, by any name. seq_len: tokens to which longer texts are cut."""
        texts: list[str] = []
        self._parts: dict[str, _Part] = {}
        self._vectors = vectors

        def table(rows: Sequence[str], role: Role) -> slice:
            texts.extend(vectors.reads(text, role) for text in rows)
            return slice(len(texts) - len(rows), len(texts))

        for name, (spec, split) in splits.items():
            if isinstance(split, RetrievalSplit):
                part = _Part(spec, table(split.queries, "query"), table(split.corpus, "document"))
            else:
                second = None if split.second is None else table(split.second, "text")
                part = _Part(spec, table(split.first, "text"), second)
            self._parts[name] = part
        self._encoded = encode_split(texts, None, tokenizer, seq_len=seq_len)
        self._pad_id = tokenizer.pad_token_id or 0

    @property
    def tokens(self) -> torch.Tensor:
        """(n,) int64 ids of the tokens that occur, each once"""
        return torch.from_numpy(np.union1d(self._encoded.ids, [self._pad_id]).astype(np.int64))

    def features(self, hidden: Hidden, depth: int, runtime: Runtime) -> TextFeatures:
        """Returns the features that a model of `depth` layers makes of all texts. Collective."""
        every_layer = any(part.spec.every_layer for part in self._parts.values())
        layers = frozenset(range(0 if every_layer else depth, depth + 1))
        batches = evaluation_batches(
            self._encoded,
            pad_id=self._pad_id,
            batch_size=AT_ONCE,
            rank=runtime.rank,
            world=runtime.world_size,
        )
        means, vectors, rows = [], [], []
        with torch.no_grad():
            for batch in batches:
                on_device = batch.to(runtime.device)
                states = hidden(on_device, layers)
                means.append(torch.stack([pool(state, on_device.attention_mask) for state in states], dim=1))
                if not self._vectors.is_mean:
                    vectors.append(self._vectors(states[-1], on_device.attention_mask))
                assert batch.rows is not None
                rows.append(batch.rows)
                watchdog.beat()

        def gathered(values: list[torch.Tensor]) -> torch.Tensor:
            return gather_rows(torch.cat(values), torch.cat(rows), total=len(self._encoded)).cpu()

        by_text = gathered(means)
        return TextFeatures(self._parts, by_text, gathered(vectors) if vectors else by_text[:, -1])


def scored_split(task: TaskData, name: str) -> ScoredSplit:
    """Returns a split of a task that is no span task: `train`, on which a choice may depend, or one of the dev splits,
    from which final scores come."""
    split = task.splits[name]
    assert isinstance(split, (Split, RetrievalSplit)), task.spec.kind
    return split


def zero_shot_metrics(spec: TaskSpec, split: ScoredSplit, features: ProbeFeatures) -> dict[str, float]:
    """Returns the metrics of a similarity task or a retrieval by the cosines of its vectors."""
    if isinstance(split, RetrievalSplit):
        assert features.second is not None, spec.name
        return retrieval_metrics(split, features.first, features.second)
    assert split.labels is not None, spec.name
    return score_task(spec, probe_outputs(spec, None, None, {"rows": features})["rows"], split.labels)
