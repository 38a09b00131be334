"""What each rank computed for its share of some rows, brought together on all of them."""

from __future__ import annotations

import torch

from engine.collectives import alone, gathered


def gather_rows(values: torch.Tensor, rows: torch.Tensor, *, total: int) -> torch.Tensor:
    """Collective. (total, ...) in the order of the rows, on every rank.

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
