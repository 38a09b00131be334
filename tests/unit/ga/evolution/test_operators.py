"""Selection, crossover and mutation, and the generation that they make."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from ga.evolution import operators
from ga.evolution.genome import Genes, Space
from ga.evolution.kept_layers import FOLLOW
from ga.evolution.operators import PRESETS, Settings, next_generation

SPACES = [
    Space(student_layers=3, teacher_layers=6),
    Space(student_layers=3, teacher_layers=6, constraint="nondecreasing", min_active=1),
    Space(student_layers=4, teacher_layers=5, constraint="strictly_increasing", allowed=(1, 3, 5)),
    Space(student_layers=2, teacher_layers=3, separate_attention=True),
    Space(student_layers=2, teacher_layers=3, kind="both"),
]
FITNESS = [0.1, 0.5, 0.3, 0.2]


def shares(select) -> list[float]:
    rng = np.random.default_rng(0)
    counts = Counter(select(rng) for _ in range(20_000))
    return [counts[i] / 20_000 for i in range(len(FITNESS))]


def test_each_selection_has_its_probabilities() -> None:
    got = shares(lambda rng: operators.tournament(FITNESS, rng, size=2))
    assert got == pytest.approx([1 / 16, 7 / 16, 5 / 16, 3 / 16], abs=0.02)  # best of two with replacement
    got = shares(lambda rng: operators.roulette(FITNESS, rng))
    assert got == pytest.approx([0, 4 / 7, 2 / 7, 1 / 7], abs=0.02)
    got = shares(lambda rng: operators.rank(FITNESS, rng, pressure=1.6))
    assert got == pytest.approx([0.4 / 4, 1.6 / 4, 1.2 / 4, 0.8 / 4], abs=0.02)
    equal = Counter(operators.roulette([0.7, 0.7], np.random.default_rng(i)) for i in range(200))
    assert min(equal.values()) > 60


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), min_size=1, max_size=8), st.integers(0, 999))
def test_crossover_takes_every_gene_from_its_own_place(pairs: list[tuple[int, int]], seed: int) -> None:
    a, b = (tuple(side) for side in zip(*pairs, strict=True))
    for mix in operators.CROSSOVERS.values():
        child = mix(a, b, np.random.default_rng(seed))
        assert all(gene in pair for gene, pair in zip(child, pairs, strict=True))
    child = operators.one_point(a, b, np.random.default_rng(seed))
    assert sum((x < 10) != (y < 10) for x, y in itertools.pairwise(child)) <= 1
    child = operators.two_point(a, b, np.random.default_rng(seed))
    assert sum((x < 10) != (y < 10) for x, y in itertools.pairwise(child)) <= 2


def test_mutation_hits_genes_at_its_rate_and_never_leaves_them_as_they_were() -> None:
    rng = np.random.default_rng(0)
    choices, start = (0, 2, 3, 7), (0, 3, 7, 2)
    each = [choices] * 4
    for rate in (0.0, 0.3, 1.0):
        changed = 0
        for _ in range(500):
            after = operators.reset(start, rng, rate=rate, choices=each)
            assert set(after) <= set(choices)
            changed += sum(a != b for a, b in zip(start, after, strict=True))
            near = operators.creep(start, rng, rate=rate, choices=each)
            assert all(abs(choices.index(a) - choices.index(b)) <= 1 for a, b in zip(start, near, strict=True))
            assert rate < 1 or all(a != b for a, b in zip(start, near, strict=True))
        assert changed / 2000 == pytest.approx(rate, abs=0.04)


def test_a_kept_layer_that_follows_creeps_with_its_mapping_alone() -> None:
    rng = np.random.default_rng(0)
    space = Space(student_layers=2, teacher_layers=3, kind="both")
    crept = {operators.creep((1, 2, FOLLOW, 0), rng, rate=1.0, choices=space.gene_choices) for _ in range(50)}
    assert {genes[2:] for genes in crept} == {(FOLLOW, 1)}
    drawn = {operators.reset((1, 2, FOLLOW, 0), rng, rate=1.0, choices=space.gene_choices)[2:] for _ in range(200)}
    assert drawn == set(itertools.product((0, 1, 2, 3), (FOLLOW, 1, 2, 3)))


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.describe())
@pytest.mark.parametrize("settings", [*PRESETS.values(), Settings(prerank=3)], ids=[*PRESETS, "preranked"])
@given(seed=st.integers(0, 10**6), known=st.integers(0, 30))
def test_a_generation_is_new_and_depends_on_seed_and_history_alone(
    space: Space, settings: Settings, seed: int, known: int
) -> None:
    draw = random.Random(seed)
    seen = draw.sample(range(space.size()), min(known, space.size() - 1))
    history: dict[Genes, float] = {space.at(i): draw.choice([draw.random(), 0.5, math.nan]) for i in seen}
    made = next_generation(space, history, settings, np.random.default_rng(seed), count=12)
    assert len(made) == len(set(made)) == min(12, space.size() - len(history))
    assert all(child in space and child not in history for child in made)
    shuffled = list(history.items())
    draw.shuffle(shuffled)
    assert next_generation(space, dict(shuffled), settings, np.random.default_rng(seed), count=12) == made


def test_the_last_genomes_of_a_space_are_found_and_then_there_are_none() -> None:
    space = Space(student_layers=2, teacher_layers=4)
    history = {genes: 0.5 for genes in space if genes != (3, 1)}
    rng = np.random.default_rng(0)
    assert next_generation(space, history, Settings(), rng, count=5) == [(3, 1)]
    assert next_generation(space, {**history, (3, 1): math.nan}, Settings(), rng, count=5) == []


def test_children_resemble_the_best() -> None:
    space = Space(student_layers=4, teacher_layers=12)
    rng = np.random.default_rng(0)
    history = {space.random(rng): 0.1 for _ in range(40)} | {(2, 5, 8, 11): 0.9, (2, 5, 9, 11): 0.8}
    settings = Settings(population=5, newcomers=0.0)
    made = next_generation(space, history, settings, rng, count=20)
    near = sum(sum(a == b for a, b in zip(child, (2, 5, 8, 11), strict=True)) >= 2 for child in made)
    assert near >= 12
    strangers = next_generation(space, history, Settings(newcomers=1.0), np.random.default_rng(1), count=20)
    assert sum(sum(a == b for a, b in zip(g, (2, 5, 8, 11), strict=True)) >= 2 for g in strangers) <= 4


def test_pre_ranking_keeps_the_offspring_that_the_model_expects_most_of() -> None:
    space = Space(student_layers=4, teacher_layers=12)
    rng = np.random.default_rng(0)
    history = {genes: -abs(genes[2] - 9) / 12 for genes in (space.random(rng) for _ in range(40))}
    many = next_generation(space, history, Settings(), np.random.default_rng(1), count=80)
    kept = next_generation(space, history, Settings(prerank=10), np.random.default_rng(1), count=8)
    assert len(set(kept)) == 8
    assert set(kept) <= set(many)
    distance = [abs(genes[2] - 9) for genes in many]
    assert sum(abs(genes[2] - 9) for genes in kept) / 8 < sum(distance) / 80 / 2


def test_too_few_evaluations_rank_no_offspring() -> None:
    space = Space(student_layers=4, teacher_layers=12)
    history = {space.at(i): float(i) for i in range(7)} | {space.at(7): math.nan}
    made = [next_generation(space, history, Settings(prerank=n), np.random.default_rng(1), count=8) for n in (1, 5)]
    assert made[0] == made[1]


def test_diversity() -> None:
    assert operators.diversity([(1, 2), (1, 2)]) == 0.0
    assert operators.diversity([(1, 2), (2, 3)]) == pytest.approx(1.0)
    assert operators.diversity([(1, 2), (1, 3)]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 1},
        {"newcomers": 1.5},
        {"tournament_size": 0},
        {"rank_pressure": 2.5},
        {"reset_rate": -1},
        {"prerank": 0},
    ],
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"search.{next(iter(wrong))}="):
        Settings(**wrong)
