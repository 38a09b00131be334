"""The space of genomes: counted, drawn and repaired without trial and error."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.mapping import LayerMapping, MappingPair
from ga.evolution.genome import Genes, Space, draw_below
from ga.evolution.kept_layers import FOLLOW

CONSTRAINTS = ("free", "nondecreasing", "strictly_increasing")


@pytest.mark.parametrize(
    ("student", "teacher", "constraint", "size"),
    [
        (3, 6, "free", 343),
        (4, 12, "free", 28_561),
        (4, 12, "strictly_increasing", 1_820),
        (6, 12, "free", 4_826_809),
        (6, 12, "strictly_increasing", 18_564),
        (6, 24, "strictly_increasing", 593_775),
    ],
)
def test_sizes_are_those_of_the_literature(student: int, teacher: int, constraint: str, size: int) -> None:
    assert Space(student_layers=student, teacher_layers=teacher, constraint=constraint).size() == size


def by_definition(mapping: Genes, space: Space) -> bool:
    active = [gene for gene in mapping if gene > 0]
    steps = list(itertools.pairwise(active))
    ordered = {
        "free": True,
        "nondecreasing": all(a <= b for a, b in steps),
        "strictly_increasing": all(a < b for a, b in steps),
    }
    allowed = space.allowed or range(1, space.teacher_layers + 1)
    return ordered[space.constraint] and len(active) >= space.min_active and set(active) <= set(allowed)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    student, teacher = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    allowed = tuple(draw(st.sets(st.integers(1, teacher), min_size=1)))
    constraint = draw(st.sampled_from(CONSTRAINTS))
    most = min(student, len(allowed)) if constraint == "strictly_increasing" else student
    return Space(
        student_layers=student,
        teacher_layers=teacher,
        constraint=constraint,
        min_active=draw(st.integers(0, most)),
        allowed=draw(st.sampled_from([(), allowed])),
        **draw(st.sampled_from([{}, {"kind": "layers"}, {"separate_attention": student < 3}])),
    )


@st.composite
def spaces_of_both(draw: st.DrawFn) -> Space:
    student, teacher = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    constraint = draw(st.sampled_from(CONSTRAINTS))
    separate = student == 1 and draw(st.booleans())
    return Space(
        student_layers=student, teacher_layers=teacher, constraint=constraint, separate_attention=separate, kind="both"
    )


@given(spaces_of_both())
def test_each_mapping_has_every_start_once(space: Space) -> None:
    M, N = space.student_layers, space.teacher_layers
    mappings = list(replace(space, kind="mapping"))
    texts = [space.text(genes) for genes in space]
    wanted = {
        str(MappingPair(LayerMapping(genes[:M], N), LayerMapping(genes[-M:], N), layers))
        for genes in mappings
        for layers in itertools.product(range(N + 1), repeat=M)
    }
    assert set(texts) == wanted
    assert space.size() == len(texts) == len(wanted)
    everything = list(space)
    assert everything == sorted(everything)
    assert [space.index(genes) for genes in everything] == list(range(len(everything)))
    assert [space.parse(text) for text in texts] == everything


@given(spaces_of_both(), st.data())
def test_repair_of_kept_layers_keeps_what_they_start_from(space: Space, data: st.DataObject) -> None:
    genes = tuple(data.draw(st.lists(st.integers(-2, 5), min_size=space.length, max_size=space.length)))
    repaired = space.repair(genes)
    assert repaired in space
    assert space.repair(repaired) == repaired
    mapping, kept = repaired[: -space.student_layers], genes[-space.student_layers :]
    assert mapping == replace(space, kind="mapping").repair(genes[: -space.student_layers])
    *_, layers = MappingPair.genes_in(space.text(repaired))
    followed = LayerMapping(mapping[: space.student_layers], space.teacher_layers).followed
    for layer, wish, other in zip(layers, kept, followed, strict=True):
        assert layer == (other if wish < 0 else min(wish, space.teacher_layers))


def test_kept_layers_follow_the_mapping_unless_they_are_named() -> None:
    space = Space(student_layers=3, teacher_layers=6, kind="both")
    assert space.parse("0-3-5") == (0, 3, 5, FOLLOW, FOLLOW, FOLLOW)
    assert space.text((0, 3, 5, FOLLOW, FOLLOW, FOLLOW)) == "2-3-5@0-3-5"
    assert space.parse("2-3-5@0-3-5") == space.parse("follow@0-3-5") == space.parse("0-3-5")
    assert space.parse("0-3-1@0-3-5") == (0, 3, 5, 0, FOLLOW, 1)
    assert [space.text(genes) for genes in space.seeds([])][-1] == "2-4-6@0-0-0"


def test_the_genes_of_a_space_of_layers_are_those_that_students_start_from() -> None:
    space = Space(student_layers=3, teacher_layers=6, kind="layers", constraint="nondecreasing")
    assert space.parse("last") == space.parse("4-5-6@uniform") == (4, 5, 6)
    assert space.text((0, 5, 6)) == "0-5-6@2-4-6"
    assert "start from 6 teacher layers or at random and learn from 2-4-6, nondecreasing" in space.describe()
    with pytest.raises(UserError, match=r"genome='1-2-3@1-2-3': search.space=layers has one mapping, 2-4-6"):
        space.parse("1-2-3@1-2-3")


@given(spaces())
def test_the_space_is_what_its_rules_say_in_order(space: Space) -> None:
    everything = itertools.product(range(space.teacher_layers + 1), repeat=space.length)
    assert space.gene_choices == (space.choices,) * space.length
    wanted = [genes for genes in everything if all(by_definition(half, space) for half in space.halves(genes))]
    assert list(space) == wanted
    assert space.size() == len(wanted)
    assert [space.index(genes) for genes in wanted] == list(range(len(wanted)))


@given(spaces(), st.data())
def test_repair_changes_as_little_as_possible(space: Space, data: st.DataObject) -> None:
    genes = tuple(data.draw(st.lists(st.integers(0, 6), min_size=space.length, max_size=space.length)))

    def distance(other: Genes) -> tuple[int, int, Genes]:
        changes = [abs(a - b) for a, b in zip(genes, other, strict=True)]
        return sum(change > 0 for change in changes), sum(changes), other

    repaired = space.repair(genes)
    assert repaired in space
    if not space.separate_attention:  # the halves are repaired apart: the same, but the order of ties differs
        assert repaired == min(space, key=distance)
    assert distance(repaired)[:2] == min(map(distance, space))[:2]
    assert space.repair(repaired) == repaired


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_random_genomes_are_uniform(constraint: str) -> None:
    space = Space(student_layers=2, teacher_layers=3, constraint=constraint, min_active=1)
    rng = np.random.default_rng(0)
    draws = 200 * space.size()
    counts = Counter(space.random(rng) for _ in range(draws))
    assert set(counts) == set(space)
    chi_square = sum((counts[genes] - 200) ** 2 / 200 for genes in space)
    assert chi_square < space.size() + 5 * (2 * space.size()) ** 0.5


def test_large_spaces_are_drawn_from_whole() -> None:
    rng = np.random.default_rng(0)
    limit = 25**48
    drawn = [draw_below(rng, limit) for _ in range(200)]
    assert max(drawn) > 0.9 * limit
    assert min(drawn) < 0.1 * limit
    space = Space(student_layers=24, teacher_layers=24, separate_attention=True)
    assert space.random(rng) in space


@given(spaces(), st.integers(0, 10**6))
def test_text_is_read_back(space: Space, number: int) -> None:
    genes = space.at(number % space.size())
    assert space.parse(space.text(genes)) == genes


def test_presets_are_repaired_and_extra_seeds_are_not() -> None:
    space = Space(student_layers=3, teacher_layers=6, constraint="strictly_increasing", min_active=2)
    assert space.seeds(["0-3-6"]) == [(2, 4, 6), (4, 5, 6), (1, 2, 3), (0, 1, 2), (0, 3, 6)]
    with pytest.raises(UserError, match=r"search.seeds='6-3-0' is outside the space .*strictly increasing"):
        space.seeds(["6-3-0"])


def test_one_mapping_stands_for_both_halves() -> None:
    space = Space(student_layers=2, teacher_layers=4, separate_attention=True)
    assert space.parse("uniform") == (2, 4, 2, 4)
    assert space.parse("0-3/1-2") == (0, 3, 1, 2)
    assert space.text((0, 3, 1, 2)) == "0-3/1-2"
    with pytest.raises(UserError, match=r"separate_attention=true"):
        Space(student_layers=2, teacher_layers=4).parse("0-3/1-2")


def test_a_genome_of_a_mapping_alone_has_no_kept_layers() -> None:
    space = Space(student_layers=2, teacher_layers=4, separate_attention=True)
    for text in ("1-2@0-3", "1-2@0-3/1-2"):
        with pytest.raises(UserError, match=rf"^search.seeds='{text}': LAYERS@ needs search.space=both"):
            space.seeds([text])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"allowed": (0, 3)}, r"search.allowed_layers=\[0, 3\]: the teacher has layers 1..6"),
        ({"min_active": 4}, "search.min_active=4: must be between 0 and the student's 3"),
        ({"constraint": "strictly_increasing", "allowed": (2, 4), "min_active": 3}, "no strictly increasing mapping"),
    ],
)
def test_a_space_that_cannot_be_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Space(student_layers=3, teacher_layers=6, **wrong)
