"""Where the ranks of several hosts meet for the first time: nobody waits for a rank that has found an error.

On one host the launcher ends all ranks as soon as one exits. On several hosts it does not: the ranks of the other hosts
would wait for half an hour. So, before a process group is made, each rank says in a key-value store whether it is
ready."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
from typing import Any

from engine.config.places import command
from engine.errors import UserError, first_line
from engine.ranks import environment

ARRIVE_WITHIN = datetime.timedelta(minutes=10)
"""Time for starting Python and reading configurations and tokenizers on the slowest host."""
LEAVE_WITHIN = datetime.timedelta(seconds=15)

_store: Any = None
_failed = False


def is_needed() -> bool:
    """Returns whether this job has ranks on other hosts, as far as its environment says, or can be started again by
    torchrun."""
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return False  # it is not known where
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        return False  # they have met
    # until PyTorch > 2.13: torchrun's store keeps what the ranks of a failed attempt have written, and gloo would
    # connect to the dead; `agree` gives each attempt a part of its own
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        return True
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = environment.local_size(os.environ)
    return local is not None and world > local


def store() -> Any:
    """Returns the store in which the ranks have met, for the process group; None before `agree`."""
    return _store


def agree(error: str | None) -> None:
    """Returns when all ranks are ready. Collective; to be called once, where it `is_needed`.

    error: what keeps this rank from going on. Raises UserError on every rank when any has one, or does not arrive.
    """
    global _store, _failed
    from torch.distributed import DistStoreError
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        shared, _, _ = next(rendezvous("env://", timeout=ARRIVE_WITHIN))
        _store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
        _store.set(f"ready/{rank}", f"{platform.node()}: {error}" if error else "")
        errors = list(dict.fromkeys(filter(None, _wait_for_all(world))))
    except (DistStoreError, RuntimeError, OSError) as failure:  # the store's own time limit, or its holder is gone
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            (error + "; also, " if error else "")
            + f"rank {rank} on {platform.node()} could not meet the others at {where}: {first_line(failure)}. Try "
            f"{command('check_hosts')}"
        ) from None
    if errors:
        _failed = True
        raise UserError("; ".join(errors))


def _wait_for_all(world: int) -> list[str]:
    """Returns what every rank has said, in the order of ranks; "" for one without an error."""
    keys = [f"ready/{rank}" for rank in range(world)]
    try:
        _store.wait(keys, ARRIVE_WITHIN)
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not _store.check([key])]
        raise RuntimeError(f"ranks {missing} did not arrive within {ARRIVE_WITHIN}") from None
    return [value.decode() for value in _store.multi_get(keys)]


def gather_errors(error: str) -> str:
    """Returns the errors of all ranks where they are about to meet, since nobody else would end the others; else this
    one."""
    if not is_needed() or store() is not None:
        return error
    try:
        agree(error)
    except UserError as errors:
        return str(errors)
    return error


def has_failed() -> bool:
    """Returns whether the ranks have met, and know the errors of all: rank 0 speaks for all, and each then calls
    `leave`."""
    return _failed


def leave() -> None:
    """Ends the meeting after an error of `agree`. Collective. Nobody leaves before rank 0 has spoken, since a launcher
    ends all ranks of its host once one has left; and rank 0, which holds the store, not before the others know that."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with contextlib.suppress(RuntimeError):  # a time limit, or the others have gone already
        if rank == 0:
            _store.set("reported", "")
            _store.wait([f"left/{other}" for other in range(1, world)], LEAVE_WITHIN)
        else:
            _store.wait(["reported"], LEAVE_WITHIN)
            _store.set(f"left/{rank}", "")
