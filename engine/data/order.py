"""The training order: which sequence stands at which position of training. A pure function of (seed, position)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_ROUNDS = 8


def _mix(x: UInts) -> UInts:
    """Applies the splitmix64 finaliser: a bijection of 64 bits that scatters them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(slots: UInts, keys: UInts, size: int) -> UInts:
    """Applies a bijection of range(size) for each key, elementwise: (n,) slots and keys -> (n,).

    It is a Feistel network over the smallest square power of two that holds `size`, walked until the value is in range:
    no table, and on average at most four passes.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    values = slots.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right, key = values[outside] >> half, values[outside] & low, keys[outside]
        for turn in range(_ROUNDS):
            key = key + np.uint64(0x9E3779B97F4A7C15)  # splitmix64's sequence of round keys
            left, right = right, left ^ (_mix(_mix(key) ^ (right + np.uint64(turn << 32))) & low)
        values[outside] = (left << half) | right
        outside = values >= size
    return values


class TrainingOrder:
    """Epochs over weighted sources.

    An epoch has `slots` positions: round(weight * size), halves up, of each source (at least one). Position p is slot
    permute(p % slots) of epoch p // slots, with a permutation of its own for each epoch. Slot j of source i in epoch e
    shows sequence (e * slots_i + j) mod size_i: weight 1 shows each sequence once an epoch, 2 twice, 0.5 one half
    and in the next epoch the other. Memory and the cost of starting anywhere do not depend on any size.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or not any(sizes):
            raise ValueError(f"sizes and weights must go together and not be empty, got {sizes} and {weights}")
        self._sizes = np.array(sizes, dtype=np.int64)
        counts = [max(1, math.floor(w * n + 0.5)) if n else 0 for n, w in zip(sizes, weights, strict=True)]
        self._counts = np.array(counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = np.uint64(seed)
        self.slots = int(self._ends[-1])
        """Positions in one epoch."""

    def indices(self, positions: npt.ArrayLike) -> Ints:
        """Returns the sequence at each position >= 0, in the shape of `positions`: numbered through the sources,
        sizes[0] sequences, then sizes[1] …"""
        shape = np.shape(positions)
        at = np.asarray(positions, dtype=np.int64).reshape(-1)
        epochs = at // self.slots
        with np.errstate(over="ignore"):
            keys = _mix(_mix(np.broadcast_to(self._seed, at.shape) + np.uint64(1)) + epochs.astype(np.uint64))
            slots = permute((at % self.slots).astype(np.uint64), keys, self.slots).astype(np.int64)
        source = np.searchsorted(self._ends, slots, side="right")
        counts, sizes = self._counts[source], self._sizes[source]
        within = slots - (self._ends[source] - counts)
        return (self._starts[source] + (epochs * counts + within) % sizes).reshape(shape)
