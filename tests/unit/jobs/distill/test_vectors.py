"""The room that vectors of texts take: by hand, and what counts as collapsed."""

from __future__ import annotations

import pytest
import torch

from engine.jobs.distill.vectors import Room


def test_room_by_hand() -> None:
    """Four vectors of any length along two axes: cosines -1 and 0, two equal singular values."""
    room = Room.of(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -0.5]]))
    assert room.cosine == pytest.approx(-4 / 12)
    assert room.rank == pytest.approx(2.0)


def test_equal_vectors_take_no_room() -> None:
    room = Room.of(torch.ones(5, 3))
    assert room.cosine == pytest.approx(1.0)
    assert room.rank <= 1.5


@pytest.mark.parametrize(
    ("student", "collapsed"),
    [(Room(0.5, 26), False), (Room(0.5, 24), True), (Room(0.8, 60), True), (Room(0.1, 200), False)],
)
def test_collapse_is_beside_the_teacher(student: Room, collapsed: bool) -> None:
    assert student.is_collapsed_beside(Room(0.2, 100)) == collapsed
