from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.order import TrainingOrder


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_an_epoch_of_one_source_is_a_permutation(size, seed, epoch):
    order = TrainingOrder([size], [1.0], seed)
    assert order.slots == size
    got = order.indices(np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(got.tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_positions_may_be_asked_for_in_any_grouping(sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=len(sizes), max_size=len(sizes)))
    order = TrainingOrder(sizes, weights, seed)
    whole = order.indices(np.arange(3 * order.slots))
    assert [int(order.indices(p)) for p in range(0, 3 * order.slots, 7)] == whole[::7].tolist()
    assert whole.min() >= 0
    assert whole.max() < sum(sizes)


def test_epochs_and_seeds_differ():
    a, b = TrainingOrder([501], [1.0], 0), TrainingOrder([501], [1.0], 1)
    first = a.indices(np.arange(501))
    assert not (first == a.indices(np.arange(501, 1002))).all()
    assert not (first == b.indices(np.arange(501))).all()
    assert abs(np.corrcoef(first, np.arange(501))[0, 1]) < 0.2


def test_shuffle_is_even():
    """Where element 0 of a small epoch lands is uniform over epochs (chi-square, 99.9 % limit for 4 degrees)."""
    order = TrainingOrder([5], [1.0], 3)
    epochs = order.indices(np.arange(5 * 4000)).reshape(4000, 5)
    counts = np.bincount(np.argmax(epochs == 0, axis=1), minlength=5)
    assert ((counts - 800) ** 2 / 800).sum() < 18.5


def test_weights():
    order = TrainingOrder([10, 7, 4], [0.5, 2.0, 1.0], 0)
    assert order.slots == 5 + 14 + 4
    epochs = [order.indices(np.arange(e * order.slots, (e + 1) * order.slots)) for e in range(2)]
    for epoch in epochs:
        seen = np.bincount(epoch, minlength=21)
        assert seen[10:17].tolist() == [2] * 7
        assert seen[17:].tolist() == [1] * 4
    halves = [set(epoch[epoch < 10].tolist()) for epoch in epochs]
    assert halves[0] | halves[1] == set(range(10))
    assert not halves[0] & halves[1]


def test_half_weights_round_up_and_every_source_appears():
    assert TrainingOrder([5, 1, 0], [0.5, 0.01, 1.0], 0).slots == 3 + 1


def test_skipping_is_free_and_large_corpora_need_no_memory():
    order = TrainingOrder([10**12], [1.0], 0)
    began = time.perf_counter()
    got = order.indices(np.arange(7 * 10**12, 7 * 10**12 + 1000))
    assert time.perf_counter() - began < 1.0
    assert len(set(got.tolist())) == 1000


def test_order_is_frozen():
    """The order is part of a run's identity: a change here breaks resuming."""
    assert TrainingOrder([11], [1.0], 42).indices(np.arange(11)).tolist() == [6, 8, 4, 3, 10, 2, 9, 1, 5, 7, 0]


def test_nothing_to_order():
    with pytest.raises(ValueError, match="not be empty"):
        TrainingOrder([0], [1.0], 0)
