"""Checks that all ranks of a run would compute the same."""

from __future__ import annotations

import platform
from typing import Any

from engine.config.identity import describe_changes
from engine.errors import UserError
from engine.ranks.collectives import from_rank_zero, gathered


def require_agreement(mine: dict[str, Any]) -> None:
    """Raises UserError on every rank when some would compute something else: hosts may have models and corpora on
    disks of their own, and different processors. mine: flat settings and hashes of inputs."""
    first = from_rank_zero(lambda: mine)
    differing = {host: keys for host, keys in gathered((platform.node(), describe_changes(first, mine))) if keys}
    if differing:
        raise UserError(
            "ranks would not compute the same ("
            + "; ".join(f"{host}: {', '.join(keys[:4])}" for host, keys in differing.items())
            + "). Bring the same files to these hosts, or name the same deepspeed_config"
        )
