"""Where sequences lie in tensors of packed tokens, which have no padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

GROUP_COSTS = 2**15
"""Entries of one head's attention that take as long as the dozen small calls of one more group on a CPU."""


class Segments:
    """Sequences of `lengths` tokens, one after the other in dimension 1 of (1, T, D) and 2 of (1, H, T, d).

    Lengths are plain numbers: kernels and loops are laid out without asking the device.
    """

    def __init__(self, lengths: Sequence[int], rows: int | None = None) -> None:
        """rows: T, where some pads are kept behind the sequences, from whose padded batch they come; unset: none."""
        self.lengths = tuple(lengths)
        self.tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.rows = self.tokens if rows is None else rows
        assert self.tokens <= self.rows <= len(self) * self.longest, (self.lengths, rows)
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._grouped: dict[torch.device, tuple[list[tuple[Segments, torch.Tensor | None]], torch.Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def _on(self, what: str, device: torch.device) -> torch.Tensor:
        """Returns a tensor that is copied to each device once. (Not by functools.cache of a bound method: that is a
        cycle, which only the collector frees.)"""
        if (what, device) not in self._copies:
            self._copies[what, device] = self._copy(what, device)
        return self._copies[what, device]

    def _copy(self, what: str, device: torch.device) -> torch.Tensor:
        ends = np.cumsum(self.lengths)
        values: np.ndarray[Any, Any]
        if what == "places":
            values = self._places
        elif what == "mask":
            values = self._is_real
        elif what == "real rows":
            values = np.arange(self.rows)[None, :] < self.tokens
        else:
            starts = {"starts": ends - self.lengths, "lengths": self.lengths, "bounds": [0, *ends]}
            values = np.array(starts[what], dtype=np.int32)
        on_host = torch.from_numpy(values)
        return on_host.to(device, non_blocking=True)

    @property
    def _is_real(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask (S, longest) of padded sequences"""
        return np.arange(self.longest) < np.array(self.lengths)[:, None]

    @functools.cached_property
    def _places(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Places (T,) of the rows in a batch that is padded to the longest sequence"""
        real = self._is_real.ravel()
        return np.concatenate([np.flatnonzero(real), np.flatnonzero(~real)[: self.rows - self.tokens]])

    def places_on(self, device: torch.device) -> torch.Tensor:
        """Returns (T,) int64: where each row lies in (S * longest) positions of padded sequences."""
        return self._on("places", device)

    def real_rows_on(self, device: torch.device) -> torch.Tensor | None:
        """Returns (1, T) bool, False for pads that were kept; None when none was."""
        return None if self.rows == self.tokens else self._on("real rows", device)

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """Returns the mask (S, longest) bool of `padded`; None when no sequence is shorter than another."""
        if self.tokens == len(self) * self.longest:
            return None
        return self._on("mask", device)

    def padded(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns (S, …, longest, …) of (1, …, T, …) with rows at `dim`, 0 at pads that were not kept;
        differentiable."""
        x = x.squeeze(0).movedim(dim - 1, 0)
        if self.mask_on(x.device) is None:
            out = x
        else:
            out = x.new_zeros(len(self) * self.longest, *x.shape[1:]).index_copy(0, self.places_on(x.device), x)
        sequences: torch.Tensor = out.unflatten(0, (len(self), self.longest))
        return sequences.movedim(1, dim)

    def packed(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns (1, …, T, …) of sequences that are padded to the longest or more; pads that are not kept are dropped;
        differentiable."""
        flat = x.narrow(dim, 0, self.longest).movedim(dim, 1).flatten(0, 1)
        if self.mask_on(x.device) is not None:
            flat = flat.index_select(0, self.places_on(x.device))
        return flat.movedim(0, dim - 1).unsqueeze(0)

    @functools.cached_property
    def _groups(self) -> list[list[int]]:
        """Numbers of sequences that are padded to the longest of their group: the cheapest partition, where a group of
        n sequences of up to L tokens costs n L^2 and GROUP_COSTS more."""
        order = np.argsort(self.lengths, kind="stable")
        squares = np.array(self.lengths, dtype=np.float64)[order] ** 2
        cost, first = np.zeros(len(self) + 1), np.zeros(len(self) + 1, dtype=np.int64)
        for end in range(1, len(self) + 1):  # of the `end` shortest
            costs = cost[:end] + (end - np.arange(end)) * squares[end - 1]
            first[end] = costs.argmin()
            cost[end] = costs[first[end]] + GROUP_COSTS
        groups: list[list[int]] = []
        end = len(self)
        while end:
            groups.append([int(i) for i in order[first[end] : end]])
            end = int(first[end])
        return groups[::-1]

    def groups_on(self, device: torch.device) -> tuple[list[tuple[Segments, torch.Tensor | None]], torch.Tensor | None]:
        """Returns the sequences in groups that are padded together: for each group its own segments and where its
        tokens lie here (None: in this order, all of them), and where each row lies when the groups' tokens are joined
        (a pad that was kept: anywhere, since nobody looks at it)."""
        if device not in self._grouped:
            ends = np.cumsum(self.lengths)
            parts, joined = [], []
            for group in self._groups:
                tokens = np.concatenate([np.arange(ends[i] - self.lengths[i], ends[i]) for i in group])
                at = torch.from_numpy(tokens).to(device, non_blocking=True)
                parts.append((Segments([self.lengths[i] for i in group]), at))
                joined.append(tokens)
            order = np.concatenate(joined)
            if len(parts) == 1 and self.rows == self.tokens and (order == np.arange(self.tokens)).all():
                self._grouped[device] = [(parts[0][0], None)], None
            else:
                back = np.concatenate([np.argsort(order), np.zeros(self.rows - self.tokens, dtype=np.int64)])
                self._grouped[device] = list(parts), torch.from_numpy(back).to(device, non_blocking=True)
        return self._grouped[device]

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """Returns (S,) int32: the first row of each sequence."""
        return self._on("starts", device)

    def lengths_on(self, device: torch.device) -> torch.Tensor:
        """Returns (S,) int32."""
        return self._on("lengths", device)

    def bounds_on(self, device: torch.device) -> torch.Tensor:
        """Returns (S + 1,) int32: 0 and the end of each sequence, as varlen attention wants them."""
        return self._on("bounds", device)


@functools.lru_cache(maxsize=64)
def segments_of_lengths(lengths: tuple[int, ...], rows: int) -> Segments:
    """Returns one object for all layers and models that meet a batch, so that its tensors are made once."""
    return Segments(lengths, rows)
