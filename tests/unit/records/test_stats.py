"""The signal ratio against tables worked by hand and scipy; degenerate tables; what the user reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from engine.records.stats import describe, rank_correlation, signal_ratio

BY_HAND = {"1-2": [0.1, 0.3], "2-1": [0.4, 0.6], "0-0": [0.3, 0.7]}
"""Means 0.2, 0.5, 0.5; their variance 0.03. Squares within 0.02 + 0.02 + 0.08 over 3. Seed means 0.8 / 3 and 1.6 / 3,
residuals plus and minus 0.1 / 3, 0.1 / 3 and 0.2 / 3: squares 2 * (0.01 + 0.01 + 0.04) / 9 over 2."""


def test_table_worked_by_hand():
    signal = signal_ratio(BY_HAND)
    assert signal is not None
    assert signal.between == pytest.approx(0.03)
    assert signal.within == pytest.approx(0.04)
    assert signal.ratio == pytest.approx(0.75)
    assert signal.chance == pytest.approx(0.5)
    assert signal.f_statistic == pytest.approx(1.5)
    assert signal.paired_within == pytest.approx(0.06 / 9)
    assert signal.paired_ratio == pytest.approx(4.5)
    assert (signal.mappings, signal.seeds, signal.note) == (3, 2, "")


def test_unbalanced_table_worked_by_hand():
    """Means 0.2, 0.5, 0.8; deviations of 0.1 in the first, of 0, 0.1, 0.1 in the second, none in the third."""
    signal = signal_ratio({"1-2": [0.1, 0.3], "2-1": [0.4, 0.5, 0.6], "0-0": [0.8]})
    assert signal is not None
    assert signal.between == pytest.approx(0.09)
    assert signal.within == pytest.approx(0.04 / 3)
    assert signal.ratio == pytest.approx(6.75)
    assert signal.chance == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert (signal.paired_within, signal.paired_ratio) == (None, None)
    assert (signal.mappings, signal.seeds) == (3, 1)


@pytest.mark.parametrize("counts", [[2, 2], [3, 3, 3, 3], [2, 5, 3], [1, 1, 4], [10, 2]])
def test_f_equals_scipy(counts):
    rng = np.random.default_rng(sum(counts))
    table = {f"{i}-0": list(rng.normal(0.7 + 0.01 * i, 0.02, n)) for i, n in enumerate(counts)}
    signal = signal_ratio(table)
    assert signal is not None
    assert signal.f_statistic == pytest.approx(stats.f_oneway(*table.values()).statistic, rel=1e-9)
    if len(set(counts)) == 1:
        assert signal.f_statistic == pytest.approx(counts[0] * signal.ratio)


def test_ratio_recovers_known_variances():
    """2,000 mappings, so that chance does not decide: between = 0.02^2 + 0.01^2 / 4; seeds have an effect of their own
    of 0.05, which only the unpaired figure sees."""
    rng = np.random.default_rng(0)
    table = 0.7 + rng.normal(0, 0.02, (2000, 1)) + rng.normal(0, 0.01, (2000, 4))
    shared = np.array([0.05, -0.05, 0.02, -0.02])
    signal = signal_ratio({str(i): list(row + shared) for i, row in enumerate(table)})
    assert signal is not None
    between = 0.02**2 + 0.01**2 / 4
    assert signal.between == pytest.approx(between, rel=0.1)
    assert signal.within == pytest.approx(0.01**2 + np.var(shared, ddof=1), rel=0.05)
    assert signal.paired_ratio == pytest.approx(between / 0.01**2, rel=0.1)


def test_chance_is_the_ratio_of_mappings_that_do_not_matter():
    rng = np.random.default_rng(1)
    signal = signal_ratio({str(i): list(row) for i, row in enumerate(rng.normal(0.7, 0.01, (3000, 2)))})
    assert signal is not None
    assert signal.ratio == pytest.approx(signal.chance, rel=0.1)


def test_pairs_by_seed_and_not_by_position():
    """The same numbers: as a whole table, and with seed 1 missing here and seed 0 there."""
    whole = signal_ratio({"1-2": {0: 0.1, 1: 0.3}, "2-1": {1: 0.6, 0: 0.4}, "0-0": {0: 0.3, 1: 0.7}})
    assert whole == signal_ratio(BY_HAND)
    holes = signal_ratio({"1-2": {0: 0.1, 1: 0.3}, "2-1": {1: 0.4, 2: 0.6}, "0-0": {0: 0.3, 2: 0.7}})
    assert holes is not None
    assert whole is not None
    assert holes.ratio == whole.ratio
    assert holes.paired_ratio is None


@pytest.mark.parametrize(
    "table", [{}, {"1-2": [0.1, 0.2]}, {"1-2": [0.1], "2-1": [0.3]}, {"1-2": [0.1, 0.2], "0-0": []}]
)
def test_none_without_two_mappings_and_a_repeated_seed(table):
    assert signal_ratio(table) is None


def test_no_seed_noise():
    signal = signal_ratio({"1-2": [0.1] * 3, "2-1": [0.3] * 3})  # their means are not 0.1 and 0.3 in the last bit
    assert signal is not None
    assert (signal.ratio, signal.f_statistic, signal.paired_ratio, signal.within) == (None, None, None, 0.0)
    assert signal.between == pytest.approx(0.02)
    assert "no seed noise" in signal.note
    assert "proxy.repeats=1" in describe(signal)


def test_nothing_but_seed_effects():
    """Every mapping gains the same from seed 1: no noise at equal seeds, and rounding is not taken for some."""
    signal = signal_ratio({"1-2": [0.1, 0.2], "2-1": [0.4, 0.5], "0-0": [0.7, 0.8]})
    assert signal is not None
    assert signal.ratio == pytest.approx(0.09 / 0.005)
    assert (signal.paired_within, signal.paired_ratio) == (0.0, None)


def test_equal_fitness_everywhere():
    signal = signal_ratio({"1-2": [0.7, 0.7], "2-1": [0.7, 0.7]})
    assert signal is not None
    assert (signal.between, signal.within, signal.ratio) == (0.0, 0.0, None)
    assert "proxy.steps" in describe(signal)


Tables = st.lists(st.lists(st.integers(-1000, 1000), min_size=1, max_size=4), min_size=2, max_size=5)


@given(Tables, st.integers(-1000, 1000), st.sampled_from([1e-3, 0.5, -2.0, 1e3]))
def test_shift_and_scale_do_not_matter(rows, shift, scale):
    given_ = signal_ratio({str(i): row for i, row in enumerate(rows)})
    moved = signal_ratio({str(i): [(x + shift) * scale for x in row] for i, row in enumerate(rows)})
    assert (given_ is None) == (moved is None) == all(len(row) == 1 for row in rows)
    if given_ is None or moved is None:
        return
    for name in ("ratio", "f_statistic", "paired_ratio"):
        before, after = getattr(given_, name), getattr(moved, name)
        assert (after is None) if before is None else after == pytest.approx(before, rel=1e-6, abs=1e-9), name
    assert moved.within == pytest.approx(given_.within * scale**2, rel=1e-6)


@given(Tables, st.randoms(use_true_random=False))
def test_order_of_mappings_and_seeds_does_not_matter(rows, random):
    items = [(str(i), list(enumerate(row))) for i, row in enumerate(rows)]
    signal = signal_ratio({key: dict(row) for key, row in items})
    random.shuffle(items)
    for _, row in items:
        random.shuffle(row)
    again = signal_ratio({key: dict(row) for key, row in items})
    assert (signal is None) == (again is None)
    if signal is not None and again is not None and signal.ratio is not None:
        assert again.ratio == pytest.approx(signal.ratio)
        assert again.paired_ratio == pytest.approx(signal.paired_ratio)


Fitness = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 4).map(float))


@given(Fitness, Fitness)
def test_rank_correlation_equals_scipy(a, b):
    common = [key for key in "abcdefgh" if key in a and key in b]
    got = rank_correlation(a, b)
    x, y = [a[key] for key in common], [b[key] for key in common]
    if len(common) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        assert got is None
    else:
        assert got == pytest.approx(stats.spearmanr(x, y).statistic)


def test_rank_correlation_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)."""
    got = rank_correlation({"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.9}, {"d": 4.0, "c": 3.0, "b": 2.0, "a": 1.0, "z": 9.0})
    assert got == pytest.approx(4.5 / np.sqrt(22.5))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"1-2": [0.1, 0.2], "2-1": [0.5, 0.4]}, "differ by more than seeds do"),
        (BY_HAND, "unless they are compared at equal seeds"),
        ({"1-2": [0.1, 0.4], "2-1": [0.5, 0.1], "0-0": [0.2, 0.3]}, "raise proxy.steps or proxy.repeats"),
    ],
)
def test_description_says_what_the_figures_mean(table, words):
    signal = signal_ratio(table)
    assert signal is not None
    text = describe(signal)
    assert words in text
    assert f"signal ratio {signal.ratio:.2f}" in text
    assert f"{signal.mappings} mappings" in text
    assert len(text.splitlines()) == 2
