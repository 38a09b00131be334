"""Batches of a tokenised task: bucketed by length, in an order that any step can be started from."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batch import Counts, TaskBatch
from engine.data.loader import StepBatches
from engine.data.order import TrainingOrder
from engine.data.prefetch import prefetch
from engine.data.share import StepShare
from engine.tasks.rows import Encoded

Ints = npt.NDArray[np.int64]

_FIRST_AT_ONCE = 16
_BUCKET = 50  # most global batches sorted together: 95 % of the positions are then real for SST-2 in batches of 32
_BUCKETS = (
    4  # fewest buckets of an epoch: with one, RTE's rows would meet 27 % of their partners again in the next epoch
)


class TaskLoader:
    """Training batches of a task.

    The rows come in the order of TrainingOrder: each once per epoch, and a batch may hold the end of one epoch and the
    beginning of the next. A bucket of consecutive rows (at most 50 global batches, and at most about one epoch) is
    sorted by length and cut into global batches, which are shuffled within the bucket.

    The order is a pure function of (rows, seed, global_batch, step). Step s is one global batch, from short rows to
    long ones, of which this rank takes its `share`. A split smaller than a global batch shows a row several times in a
    step.
    """

    def __init__(
        self,
        encoded: Encoded,
        share: StepShare,
        *,
        pad_id: int,
        seed: int,
        pin_memory: bool = False,
        windows: Iterable[int] = (),
    ) -> None:
        """windows: tokens to each side within which pairs of tokens are counted."""
        assert len(encoded) > 0, "no rows"
        self._encoded, self._lengths, self._share = encoded, encoded.lengths, share
        self._windows = frozenset(windows)
        self._order = TrainingOrder([len(encoded)], [1.0], seed)
        self._seed, self._pad_id, self._pin_memory = seed, pad_id, pin_memory
        self._bucket_steps = _bucket_steps(len(encoded) / share.global_batch)
        self._bucket: tuple[int, Ints] | None = None
        self.wait_s = 0.0
        """Seconds that the consumer of steps() has waited for data."""

    def step(self, step: int) -> StepBatches:
        """Returns this rank's TaskBatch micro batches of optimizer step `step` (from 0); at the same cost for every
        step, apart from sorting its bucket."""
        batches = [self._batch(self._rows(step, micro, self._share.rank)) for micro in range(self._share.micro_steps)]
        return StepBatches(step, [*batches], sum((batch.counts for batch in batches), Counts()))

    def _rows(self, step: int, micro: int, rank: int) -> Ints:
        number, within = divmod(step, self._bucket_steps)
        return self._bucket_rows(number)[within][self._share.part(micro, rank)]

    def sequence_ids(self, step: int, micro: int, rank: int) -> list[int]:
        """Returns the numbers of the rows that `rank` trains on in micro step `micro` of `step`, all from 0."""
        return [int(row) for row in self._rows(step, micro, rank)]

    def steps(self, start: int) -> Generator[StepBatches, None, None]:
        """Yields steps start, start + 1, … without end, made ahead by a thread, which ends when the iterator is
        closed."""
        return prefetch(self.step, start, name="task-loader", on_wait=self._add_wait)

    def first_batches(self, rows: int) -> Iterator[TaskBatch]:
        """Yields the first rows in the order of training, each once, unsorted: the same on every rank whatever the
        micro batch."""
        rows = min(rows, len(self._encoded))
        for start in range(0, rows, _FIRST_AT_ONCE):
            yield self._batch(self._order.indices(np.arange(start, min(start + _FIRST_AT_ONCE, rows))))

    def _add_wait(self, seconds: float) -> None:
        self.wait_s += seconds

    def _batch(self, rows: Ints) -> TaskBatch:
        batch = _padded(self._encoded, rows, self._pad_id, self._windows)
        return batch.pin_memory() if self._pin_memory else batch

    def _bucket_rows(self, number: int) -> Ints:
        """Returns the (steps of a bucket, global_batch) row numbers of bucket `number`, in the order of training."""
        bucket = self._bucket  # read once: the thread of steps() may change it meanwhile
        if bucket is None or bucket[0] != number:
            size = self._bucket_steps * self._share.global_batch
            rows = self._order.indices(np.arange(number * size, (number + 1) * size))
            rows = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(
                self._bucket_steps, self._share.global_batch
            )
            order = np.random.default_rng([self._seed, number]).permutation(self._bucket_steps)
            self._bucket = bucket = (number, rows[order])
        return bucket[1]


def steps_for(rows: int, *, epochs: float, global_batch: int) -> int:
    """Returns the optimizer steps in which at least `epochs` epochs are seen; at least 1."""
    return max(1, math.ceil(Fraction(str(epochs)) * rows / global_batch))  # exact: as floats, 1.1 * 400 is above 440


def _bucket_steps(epoch_steps: float) -> int:
    """Returns the steps of a bucket, so that a whole number of buckets makes nearly one epoch: training stops after
    whole epochs, and where a bucket is cut short, rows of the last epoch would be missing."""
    fewest = max(_BUCKETS, math.ceil(epoch_steps / _BUCKET))
    sizes = [(count, max(1, round(epoch_steps / count))) for count in range(fewest, fewest + _BUCKETS)]
    return min(sizes, key=lambda size: abs(size[0] * size[1] - epoch_steps))[1]


def evaluation_batches(
    encoded: Encoded, *, pad_id: int, batch_size: int, rank: int, world: int, pin_memory: bool = False
) -> Iterator[TaskBatch]:
    """Yields this rank's share of all rows: each row once over all ranks, `batch.rows` says which; at most batch_size
    rows in a batch, all of about the same length, the longest first (a lack of memory shows at once).

    Every rank gets the same number of batches, for collectives within the model's forward. Where there are fewer rows
    left than ranks, the last ranks get a stand-in: a batch of one row of the split, with the row number -1 and counts
    of 0, whose outputs must be dropped. A split without rows gives no batches.
    """
    assert 0 <= rank < world, (rank, world)
    rounds = math.ceil(len(encoded) / (batch_size * world))
    if rounds == 0:
        return
    longest_first = np.argsort(-encoded.lengths, kind="stable")
    for together in np.array_split(longest_first, rounds):
        rows = np.array_split(together, world)[rank]
        batch = _padded(encoded, rows, pad_id) if len(rows) else _stand_in(encoded, together[-1:], pad_id)
        yield batch.pin_memory() if pin_memory else batch


def _stand_in(encoded: Encoded, rows: Ints, pad_id: int) -> TaskBatch:
    return replace(_padded(encoded, rows, pad_id), counts=Counts(), rows=torch.full((len(rows),), -1))


def _padded(encoded: Encoded, rows: Ints, pad_id: int, windows: Iterable[int] = ()) -> TaskBatch:
    """Returns the rows as one batch, padded to the longest of them. windows: as for TaskLoader."""
    starts = encoded.starts[rows]
    lengths = encoded.starts[rows + 1] - starts
    length = int(lengths.max())
    real = np.arange(length) < lengths[:, None]
    at = (starts[:, None] + np.arange(length))[real]  # where each real token stands, row after row

    def laid_out(values: npt.NDArray[np.int32] | npt.NDArray[np.int8], padding: int) -> torch.Tensor:
        grid = np.full(real.shape, padding, np.int64)
        grid[real] = values[at]
        return torch.from_numpy(grid)

    return TaskBatch(
        input_ids=laid_out(encoded.ids, pad_id),
        attention_mask=None if real.all() else torch.from_numpy(real.astype(np.int64)),
        labels=None,
        counts=Counts.from_lengths(lengths, windows=windows),
        lengths=tuple(lengths.tolist()),
        token_types=None if encoded.types is None else laid_out(encoded.types, 0),
        targets=None if encoded.targets is None else torch.from_numpy(encoded.targets[rows]),
        rows=torch.from_numpy(rows.astype(np.int64)),
    )
