"""One vector of a text: each way of pooling, and what pads do to it."""

from __future__ import annotations

import pytest
import torch

from engine.models.pooling import pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [True, False])
def test_pool_is_the_mean_over_real_tokens(dtype, masked):
    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    lengths = [7, 3, 1] if masked else [7, 7, 7]
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths]) if masked else None
    want = torch.stack([row[:n].double().mean(0) for row, n in zip(hidden, lengths, strict=True)])
    poisoned = hidden.clone()
    if mask is not None:
        poisoned[mask == 0] = float("nan")
    got = pool(poisoned, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_pool_of_a_row_without_tokens_is_zero():
    assert pool(torch.ones(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[0.0, 0.0, 0.0]]


BY_HAND = {
    "mean": [[2.0, 3.0], [5.0, 7.0]],
    "mean_sqrt_len_tokens": [[4.0 / 2**0.5, 6.0 / 2**0.5], [5.0, 7.0]],
    "weightedmean": [[(1 * 1 + 2 * 3) / 3, (1 * 4 + 2 * 2) / 3], [5.0, 7.0]],
    "cls": [[1.0, 4.0], [5.0, 7.0]],
    "lasttoken": [[3.0, 2.0], [5.0, 7.0]],
    "max": [[3.0, 4.0], [5.0, 7.0]],
}


@pytest.mark.parametrize("way", BY_HAND)
def test_each_way_by_hand(way):
    """Two tokens and a pad; one token and two pads."""
    nan = float("nan")
    hidden = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [nan, nan]], [[5.0, 7.0], [nan, nan], [nan, nan]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(pool(hidden, mask, [way]), torch.tensor(BY_HAND[way]))


def test_ways_stand_side_by_side():
    hidden = torch.randn(2, 4, 3)
    both = pool(hidden, None, ["cls", "max"])
    torch.testing.assert_close(both, torch.cat([pool(hidden, None, ["cls"]), pool(hidden, None, ["max"])], 1))
