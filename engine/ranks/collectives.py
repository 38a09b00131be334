"""Small exchanges between ranks, of numbers and Python objects: what one of them has read or met, all of them must act
on. They go over gloo, so that no device is waited for. Before a process group exists a rank is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from engine.errors import RunFailure, UserError

T = TypeVar("T")

_gloo: tuple[Any, Any] | None = None
"""Default group for which a gloo group was made, and that group."""


def alone() -> bool:
    """Returns whether there is no other rank."""
    dist = torch.distributed
    return not dist.is_initialized() or dist.get_world_size() == 1


def _group() -> Any:
    """Returns the gloo group of all ranks. Collective at its first call."""
    global _gloo
    dist = torch.distributed
    if dist.get_backend() == "gloo":
        return None  # the default group
    if _gloo is None or _gloo[0] is not dist.group.WORLD:
        _gloo = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _gloo[1]


def summed(numbers: Sequence[float]) -> list[float]:
    """Returns the sums over all ranks, in float64. Collective."""
    if alone():
        return [float(number) for number in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(sums, group=_group())
    return sums.tolist()


def gathered(value: T) -> list[T]:
    """Returns the value of every rank, in their order. Tensors in it must lie on the CPU. Collective."""
    if alone():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=_group())
    return values


def from_rank_zero(make: Callable[[], T]) -> T:
    """Returns on every rank what rank 0 makes: its host alone may have the files. Collective. Raises its UserError on
    every rank; after any other error of it, RunFailure on the others, which must not wait for ever."""
    dist = torch.distributed
    if alone():
        return make()
    value_and_error: list[Any] = [None, None]
    own_error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            value_and_error[0] = make()
        except Exception as error:
            own_error = error
            shown = error if isinstance(error, UserError) else RunFailure(f"{type(error).__name__}: {error}")
            value_and_error[1] = shown
    dist.broadcast_object_list(value_and_error, src=0, group=_group())
    value: T
    value, error_of_zero = value_and_error
    if error_of_zero is not None:
        raise own_error or error_of_zero
    return value


class _GatherVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        shares = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shares, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.narrow(0, torch.distributed.get_rank() * ctx.count, ctx.count)


def gather_vectors(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns (world * B, D) of (B, D) of each rank, B the same on all, and where this rank's begin; differentiable:
    each rank's rows get the sum of the gradients of all ranks. Collective, on the rows' device."""
    if alone():
        return rows, 0
    gathered_rows: torch.Tensor = _GatherVectors.apply(rows)  # type: ignore[no-untyped-call]
    return gathered_rows, torch.distributed.get_rank() * len(rows)


def gather_rows(values: torch.Tensor, rows: torch.Tensor, *, total: int) -> torch.Tensor:
    """Returns (total, ...) in the order of the rows, on every rank. Collective.

    values: (k, ...) of this rank's rows (k,) int64; row -1 is a stand-in that is dropped (see evaluation_batches).
    Shares may differ in size. Every row must have come from exactly one rank.
    """
    real = rows >= 0
    values, rows = values[real.to(values.device)], rows[real]
    if not alone():
        shares = gathered((values.cpu(), rows.cpu()))
        values, rows = torch.cat([share[0] for share in shares]), torch.cat([share[1] for share in shares])
    assert len(rows) == total == len(torch.unique(rows)), f"{len(rows)} of {total} rows were gathered"
    ordered = torch.empty_like(values)
    ordered[rows.to(values.device)] = values
    return ordered
