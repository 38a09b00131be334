"""Losses between two log steps, summed on the device, and where they were not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NEVER = 2**62


@dataclass(frozen=True)
class BadMicroStep:
    """The first micro step of a window with a value that is not finite."""

    step: int
    micro: int
    """Number within the step, from 0."""
    rank: int
    values: tuple[int, ...]
    """Places in [total, *terms] of what was not finite."""


@dataclass(frozen=True)
class WindowReport:
    """Means and bad steps of a window, over all ranks."""

    means: list[float]
    """Means of [total, *terms], values that are not finite left out; nan where none is left."""
    bad_steps: list[int]
    """Steps with a value that was not finite, on any rank."""
    first_bad: BadMicroStep | None


class LossWindow:
    """Sums total and terms since the last log step, on the device. `length`: steps between two log steps."""

    def __init__(
        self, terms: int, device: torch.device, *, length: int, grad_accum_steps: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        self._accumulation, self._rank, self._ranks = grad_accum_steps, rank, ranks
        self._sums = torch.zeros(2 * (terms + 1) + length, device=device)
        self._values, self._counts = self._sums[: terms + 1], self._sums[terms + 1 : 2 * (terms + 1)]
        self._bad_in_step = self._sums[2 * (terms + 1) :]
        self._first = torch.full((), _NEVER, device=device, dtype=torch.int64)
        self._first_values = torch.zeros(terms + 1, device=device)
        self._steps: list[int] = []

    def add(self, total: torch.Tensor, terms: torch.Tensor, *, step: int, micro: int) -> None:
        """Adds a micro step: total (scalar) and terms (T,), on the device, from where nothing is read back. micro: its
        number within the step, from 0."""
        if not self._steps or self._steps[-1] != step:
            self._steps.append(step)
        values = torch.cat([total.detach().float().reshape(1), terms])
        finite = torch.isfinite(values)
        self._values += torch.where(finite, values, 0.0)
        self._counts += finite
        bad = ~finite.all()
        self._bad_in_step[len(self._steps) - 1] += bad
        number = (step * self._accumulation + micro) * self._ranks + self._rank
        is_first = bad & (self._first == _NEVER)
        self._first = torch.where(is_first, number, self._first)
        self._first_values = torch.where(is_first, (~finite).float(), self._first_values)

    def reduce(self) -> WindowReport:
        """Returns means and bad steps of the window, and starts a new one. Waits for the device. Collective."""
        if self._ranks > 1:
            torch.distributed.all_reduce(self._sums)
        values, counts = self._values.tolist(), self._counts.tolist()
        bad = [step for step, times in zip(self._steps, self._bad_in_step.tolist(), strict=False) if times]
        empty = float("nan") if self._steps else 0.0
        means = [value / count if count else empty for value, count in zip(values, counts, strict=True)]
        report = WindowReport(means, bad, self._locate() if bad else None)
        self._sums.zero_()
        self._first.fill_(_NEVER)
        self._first_values.zero_()
        self._steps.clear()
        return report

    def _locate(self) -> BadMicroStep:
        """Returns the first micro step of the window with a value that is not finite. Collective."""
        first, values = self._first.clone(), self._first_values.clone()
        if self._ranks > 1:
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
            values *= self._first == first
            torch.distributed.all_reduce(values)
        before, rank = divmod(int(first.item()), self._ranks)
        step, micro = divmod(before, self._accumulation)
        return BadMicroStep(step, micro, rank, tuple(i for i, bad in enumerate(values.tolist()) if bad))
