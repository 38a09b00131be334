"""Small exchanges of Python objects between ranks: what one of them has read or met, all of them must act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from engine.errors import UserError

T = TypeVar("T")


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def gathered(value: T) -> list[T]:
    """Collective. The value of every rank, in their order."""
    dist = torch.distributed
    if _alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def from_rank_zero(make: Callable[[], T]) -> T:
    """Collective. What rank 0 makes: its host alone may have the files. Raises its UserError on every rank."""
    dist = torch.distributed
    if _alone():
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    made: T = box[0]
    return made
