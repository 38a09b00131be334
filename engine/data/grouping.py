"""Steps of sequences of about one length, so that their batches have few pads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

WINDOW = 32
"""Steps whose sequences are sorted together. transformers' `group_by_length` takes 50 batches."""


class LengthGroups:
    """The order of training with the sequences of WINDOW steps sorted by length, and these steps in random order.

    A pure function of seed and position, like the order below it. Sequences of one length stay in order.
    """

    def __init__(self, lengths: Callable[[Ints], Ints], global_batch: int, seed: int) -> None:
        """lengths: (n,) positions -> (n,) tokens of the sequences there."""
        self._lengths, self._global_batch, self._seed = lengths, global_batch, seed
        self._window: tuple[tuple[int, int], Ints] | None = None

    def positions(self, step: int, first: int) -> Ints:
        """Returns the (global_batch,) positions of a step, counted from 0 where the positions are counted from
        `first`, by length."""
        window, within = divmod(step, WINDOW)
        key, made = (window, first), self._window
        if made is None or made[0] != key:
            made = self._window = key, self._sorted(window, first)
        return made[1][within]

    def _sorted(self, window: int, first: int) -> Ints:
        count = WINDOW * self._global_batch
        places = np.arange(first + window * count, first + (window + 1) * count, dtype=np.int64)
        steps = places[np.argsort(self._lengths(places), kind="stable")].reshape(WINDOW, self._global_batch)
        return steps[np.random.default_rng([self._seed, first, window]).permutation(WINDOW)]
