"""Batches of a prepared corpus: world-size independent order, held-out slice, prefetching, resume at any step."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batch import Batch, Counts
from engine.data.grouping import LengthGroups
from engine.data.manifest import Manifest, check_tokenizer, load_manifest
from engine.data.masking import MaskingTables, mask_tokens
from engine.data.order import TrainingOrder
from engine.data.prefetch import prefetch
from engine.data.shard_check import ShardCheck
from engine.data.shards import AGAIN, SequenceStore
from engine.data.share import StepShare
from engine.errors import UserError
from engine.kernels.inputs import UNSCORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]

_EVALUATION_SAMPLES = 1 << 62  # sample ids of held-out sequences for masking: far from any training position
_FIRST_AT_ONCE = 16


@dataclass(frozen=True)
class StepBatches:
    """This rank's share of one optimizer step."""

    step: int
    micro: list[Batch]
    local_counts: Counts
    """Sum over `micro`."""


class CorpusLoader:
    """Batches of the corpus that launch/prepare_data.py wrote to `path`.

    Step s (0-based) trains on positions s * global_batch … (s + 1) * global_batch - 1 of TrainingOrder, of which this
    rank takes its `share`; with `group_by_length` on those that LengthGroups gives it.

    Raises UserError when the corpus is not finished, of another tokenizer or length, or too small; and when a shard is
    used that is missing or torn, or gives what is no sequence. check: of the same corpus; what it finds, and what any
    rank cannot make a step of until then, is raised in place of a step, on every rank.
    """

    def __init__(
        self,
        path: str | Path,
        share: StepShare,
        *,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int | None = None,
        eval_sequences: int,
        seed: int,
        group_by_length: bool = False,
        mlm_probability: float = 0.0,
        whole_word: bool = False,
        pin_memory: bool = False,
        manifest: Manifest | None = None,
        check: ShardCheck | None = None,
        windows: Iterable[int] = (),
    ) -> None:
        """windows: within which pairs of tokens are counted."""
        self.manifest = manifest if manifest is not None else load_manifest(path)
        self.check = check
        check_tokenizer(self.manifest, tokenizer)
        if seq_len is not None and seq_len != self.manifest.seq_len:
            raise UserError(
                f"data.seq_len={seq_len}: {path} was prepared with {self.manifest.seq_len}; prepare it again, or "
                "unset it"
            )
        if 0 < eval_sequences < share.world:
            raise UserError(
                f"data.eval_sequences={eval_sequences}: give 0 or at least one for each of {share.world} ranks"
            )
        self._folder = Path(path)
        self._store = SequenceStore(self._folder, self.manifest)
        sizes = [source.sequences for source in self.manifest.sources]
        weights = [source.weight for source in self.manifest.sources]
        held_out = held_out_counts(sizes, weights, eval_sequences)
        train = [size - count for size, count in zip(sizes, held_out, strict=True)]
        self.order = TrainingOrder(train, weights, seed)
        ends = np.cumsum(np.array(sizes, dtype=np.int64))
        self._train_ends = np.cumsum(np.array(train, dtype=np.int64))
        self._shift = (ends - sizes) - (
            self._train_ends - train
        )  # from a number among training sequences to the corpus
        self._evaluation = np.concatenate(
            [np.arange(end - count, end) for end, count in zip(ends, held_out, strict=True)]
        ).astype(np.int64)
        self._tables = MaskingTables.from_tokenizer(tokenizer) if mlm_probability > 0 else None
        if self._tables is not None and whole_word and self._tables.continuation is None:
            raise UserError(
                f"data.whole_word_mask=true: the tokenizer {tokenizer.name_or_path!r} does not mark where words begin; "
                "set it to false"
            )
        self._pin_memory, self._windows = pin_memory, frozenset(windows)
        self._mlm_probability, self._whole_word, self._seed = mlm_probability, whole_word, seed
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._share = share
        self._groups = LengthGroups(self._lengths, share.global_batch, seed) if group_by_length else None
        self._origin = 0, 0
        """A step, and the position in the order of sequences that it begins at."""
        self.wait_s = 0.0
        """Seconds that the consumer of steps() has waited for data."""

    def step(self, step: int) -> StepBatches:
        """Returns this rank's batches of optimizer step `step` (from 0), at the same cost for every step."""
        batches = []
        for micro in range(self._share.micro_steps):
            positions = self._positions(step, micro, self._share.rank)
            batches.append(replace(self._batch(self._rows(positions), positions), step=step))
        return StepBatches(step, batches, sum((batch.counts for batch in batches), Counts()))

    def start_at(self, step: int, position: int) -> None:
        """Makes `step` (from 0) begin at a position in the order of sequences, for a run whose batch was another."""
        self._origin = step, position

    def _positions(self, step: int, micro: int, rank: int) -> Ints:
        origin, position = self._origin
        part = self._share.part(micro, rank)
        if self._groups is not None:
            return self._groups.positions(step - origin, position)[part]
        first = position + (step - origin) * self._share.global_batch
        return first + np.arange(part.start, part.stop, dtype=np.int64)

    def _lengths(self, positions: Ints) -> Ints:
        return self._store.lengths(self._rows(positions))

    def _rows(self, positions: Ints) -> Ints:
        numbers = self.order.indices(positions)
        rows: Ints = numbers + self._shift[np.searchsorted(self._train_ends, numbers, side="right")]
        return rows

    def sequence_ids(self, step: int, micro: int, rank: int) -> list[int]:
        """Returns the numbers in the corpus of what `rank` trains on in micro step `micro` of `step`, all from 0."""
        return [int(row) for row in self._rows(self._positions(step, micro, rank))]

    def steps(self, start: int) -> Generator[StepBatches, None, None]:
        """Yields steps start, start + 1, … without end, made ahead by a thread, which ends when the iterator is
        closed."""
        with closing(prefetch(self.step, start, name="corpus-loader", on_wait=self._add_wait)) as made:
            while True:
                try:
                    batches = next(made)
                except UserError as error:
                    if self.check is not None:
                        self.check.before_step(error)
                    raise
                if self.check is not None:
                    self.check.before_step()
                yield batches

    def finish_check(self) -> bool:
        """Returns whether the corpus is known to be whole by now; raises what was found of late. Collective."""
        return self.check is None or not self.check.agree()

    def _add_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields this rank's share of the held-out sequences: each of them once over all ranks, the same number of
        batches on every rank, none empty. A batch may have one sequence more than a `batch_size` of 1 says, where the
        ranks' shares are uneven. Masking is the same at every call."""
        count = len(self._evaluation)
        if count == 0:
            return
        rank, world = self._share.rank, self._share.world
        smallest, largest = count // world, math.ceil(count / world)
        rounds = min(smallest, math.ceil(largest / batch_size))  # a rank cannot fill more rounds than it has sequences
        for chosen in np.array_split(np.arange(rank, count, world), rounds):
            yield self._batch(self._evaluation[chosen], _EVALUATION_SAMPLES + chosen)

    def first_batches(self, sequences: int) -> Iterator[Batch]:
        """Yields the first sequences that training will see, each once, without masking: the same on every rank
        whatever the micro batch."""
        sequences = min(sequences, self.order.slots)
        for start in range(0, sequences, _FIRST_AT_ONCE):
            positions = np.arange(start, min(start + _FIRST_AT_ONCE, sequences), dtype=np.int64)
            yield self._batch(self._rows(positions), None)

    def _batch(self, rows: Ints, samples: Ints | None) -> Batch:
        """Returns the sequences of these numbers as one batch, padded to the longest.

        samples: numbers of the sequences in the stream of random masks; None: no masking.
        """
        sequences = self._store.rows(rows)
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        length = int(lengths.max())
        if lengths.min() < 1 or length > self.manifest.seq_len:
            raise self._damage_error(rows, (lengths < 1) | (lengths > self.manifest.seq_len))
        ids = np.full((len(sequences), length), self._pad_id, dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise self._damage_error(rows, np.logical_or(ids < 0, ids >= self.manifest.vocab_size).any(axis=1))
        mask = None if (lengths == length).all() else (np.arange(length) < lengths[:, None]).astype(np.int64)
        labels = None
        if self._tables is not None and samples is not None:
            ids, labels = mask_tokens(
                ids,
                mask,
                samples,
                probability=self._mlm_probability,
                whole_word=self._whole_word,
                tables=self._tables,
                seed=self._seed,
            )
        counts = Counts.from_lengths(
            lengths, masked=0 if labels is None else int((labels != UNSCORED_LABEL).sum()), windows=self._windows
        )
        batch = Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=None if mask is None else torch.from_numpy(mask),
            labels=None if labels is None else torch.from_numpy(labels),
            counts=counts,
            lengths=tuple(lengths.tolist()),
        )
        return batch.pin_memory() if self._pin_memory else batch

    def _damage_error(self, rows: Ints, bad: npt.ArrayLike) -> UserError:
        """Returns the error that names the file. bad: which of the rows hold what the tokenizer cannot have given."""
        row, shards = int(rows[np.asarray(bad)][0]), self.manifest.shards
        shard = int(np.searchsorted(np.cumsum([entry.sequences for entry in shards]), row, side="right"))
        return UserError(
            f"{self._folder / shards[shard].file}: sequence {row} of the corpus has no tokens, more than seq_len="
            f"{self.manifest.seq_len}, or ids from vocab_size={self.manifest.vocab_size} on: the file or the manifest "
            f"is damaged; copy both again, or delete the file and {AGAIN}"
        )


def held_out_counts(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """Returns how many sequences at the end of each source are held out: proportional to size * weight (largest
    remainders), and every source keeps at least one to train on. Raises UserError where there are not enough."""
    most = [max(0, size - 1) for size in sizes]
    if total > sum(most):
        raise UserError(
            f"data.eval_sequences={total}: the corpus has only {sum(sizes)} sequences, and some must be left to train "
            f"on; hold out at most {sum(most)}"
        )
    mass = [size * weight for size, weight in zip(sizes, weights, strict=True)]
    ideal = [total * m / sum(mass) for m in mass]
    counts = [min(math.floor(x), limit) for x, limit in zip(ideal, most, strict=True)]
    while sum(counts) < total:
        open_sources = [i for i in range(len(sizes)) if counts[i] < most[i]]
        furthest = max(open_sources, key=lambda i: (ideal[i] - counts[i], -i))
        counts[furthest] += 1
    return counts
