from __future__ import annotations

import pytest

from engine.data.share import StepShare


@pytest.mark.parametrize(("micro_batch", "world"), [(12, 1), (4, 3), (2, 2), (1, 12)])
def test_every_place_of_a_step_is_taken_once_and_micro_steps_follow_each_other(micro_batch: int, world: int) -> None:
    share = StepShare(12, micro_batch, world=world)
    places = list(range(12))
    parts = [places[share.part(micro, rank)] for micro in range(share.micro_steps) for rank in range(world)]
    assert [place for part in parts for place in part] == places
    assert {len(part) for part in parts} == {micro_batch}


@pytest.mark.parametrize("wrong", [{"micro_batch": 3}, {"world": 3, "micro_batch": 2}, {"rank": 1}, {"rank": -1}])
def test_wrong_shares_are_our_bugs(wrong: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        StepShare(**{"global_batch": 8, "micro_batch": 8, **wrong})
