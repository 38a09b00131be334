from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.mapping import LayerMapping, MappingPair, RandomEachStep, parse_mapping, round_half_up, uniform

GOLDEN = [  # (preset, M, N, text form)
    ("uniform", 4, 12, "3-6-9-12"),
    ("uniform", 6, 12, "2-4-6-8-10-12"),
    ("uniform", 3, 6, "2-4-6"),
    ("uniform", 5, 12, "2-5-7-10-12"),  # 2.4 4.8 7.2 9.6 12
    ("uniform", 4, 6, "2-3-5-6"),  # 1.5 and 4.5 go up
    ("uniform", 8, 12, "2-3-5-6-8-9-11-12"),
    ("last", 4, 12, "9-10-11-12"),
    ("last-only", 4, 12, "0-0-0-12"),
    ("last-only", 7, 6, "0-0-0-0-0-0-6"),
    ("first", 4, 12, "1-2-3-4"),
    ("all-last", 4, 12, "12-12-12-12"),
    ("none", 4, 12, "0-0-0-0"),
]


@pytest.mark.parametrize(("preset", "M", "N", "text"), GOLDEN)
def test_presets(preset: str, M: int, N: int, text: str) -> None:
    assert str(parse_mapping(preset, student_layers=M, teacher_layers=N)) == text


def test_text_form_round_trips_and_gives_pairs() -> None:
    mapping = parse_mapping("0-5-0-10", student_layers=4, teacher_layers=12)
    assert str(mapping) == "0-5-0-10"
    assert mapping.pairs == ((2, 5), (4, 10))


def test_random_is_a_function_of_its_seed() -> None:
    a, b, c = (parse_mapping(f"random:{s}", student_layers=6, teacher_layers=12) for s in (7, 7, 8))
    assert a == b != c


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_half_goes_up(n: int, d: int) -> None:
    value = round_half_up(n, d)
    assert value - 0.5 <= n / d < value + 0.5 or n / d == value - 0.5


@given(st.integers(1, 24), st.integers(1, 48))
def test_uniform_is_monotone_and_ends_at_the_top(M: int, N: int) -> None:
    genes = uniform(M, N)
    assert list(genes) == sorted(genes)
    assert genes[-1] == N
    LayerMapping(genes, N)


@given(st.integers(1, 24), st.integers(1, 48))
def test_last_only_maps_the_last_layer_to_the_last(M: int, N: int) -> None:
    assert parse_mapping("last-only", student_layers=M, teacher_layers=N).pairs == ((M, N),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3-6-9", "has 3 layers, but the student has 4"),
        ("3-6-9-13", "teacher layer 13"),
        ("3,6,9,12", "not a layer mapping"),
        ("unifrom", "uniform, last, last-only, first"),
        ("random-each-step", "is not a fixed mapping, and only mapping.hidden takes it: write one, e.g. 3-6-9-12"),
        ("random:x", "whole number"),
        ("random:²", "whole number"),
        ("1-2-3-²", "not a layer mapping"),
        ("", "not a layer mapping"),
        ("-1-2-3-4", "not a layer mapping"),
    ],
)
def test_bad_text_names_key_and_remedy(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        parse_mapping(text, student_layers=4, teacher_layers=12, key="mapping.hidden")
    assert "mapping.hidden" in str(error.value)


def test_last_needs_enough_teacher_layers() -> None:
    with pytest.raises(UserError, match="at least as many teacher layers"):
        parse_mapping("last", student_layers=7, teacher_layers=6)


@st.composite
def pairs(draw: st.DrawFn) -> MappingPair:
    M, N = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    genes = st.tuples(*[st.integers(0, N)] * M)
    hidden = draw(genes)
    attention = draw(st.one_of(st.just(hidden), genes))
    return MappingPair(LayerMapping(hidden, N), LayerMapping(attention, N), draw(st.one_of(st.none(), genes)))


@given(pairs())
def test_the_text_of_a_genome_is_read_back(pair: MappingPair) -> None:
    sizes = {"student_layers": pair.hidden.student_layers, "teacher_layers": pair.hidden.teacher_layers}
    assert MappingPair.parse(str(pair), **sizes, key="genomes") == pair
    assert MappingPair.genes_in(str(pair)) == (pair.hidden.genes, pair.attention.genes, pair.layers or ())
    assert pair.separate == (pair.hidden.genes != pair.attention.genes)


@pytest.mark.parametrize(
    ("given", "text", "file_name"),
    [
        ("2-4", "2-4", "2-4"),
        ("02-4", "2-4", "2-4"),
        ("uniform", "6-12", "6-12"),
        ("2-4/2-4", "2-4", "2-4"),
        ("2-4/0-11", "2-4/0-11", "2-4_0-11"),
        ("uniform/none", "6-12/0-0", "6-12_0-0"),
        ("0-3/last", "0-3/11-12", "0-3_11-12"),
        ("random:7", "5-2", "5-2"),
        ("random:7/random:8", "5-2/3-5", "5-2_3-5"),
        ("0-6@1-3", "0-6@1-3", "0-6@1-3"),
        ("2-4@1-3/5-6", "2-4@1-3/5-6", "2-4@1-3_5-6"),
        ("last@uniform/uniform", "11-12@6-12", "11-12@6-12"),
        ("follow@0-3", "6-3@0-3", "6-3@0-3"),
        ("follow@0-3/1-2", "6-3@0-3/1-2", "6-3@0-3_1-2"),
    ],
)
def test_the_canonical_text_of_a_genome_and_its_file_name(given: str, text: str, file_name: str) -> None:
    pair = MappingPair.parse(given, student_layers=2, teacher_layers=12, key="genomes")
    assert (str(pair), pair.file_name) == (text, file_name)


def test_file_names_tell_genomes_apart() -> None:
    one = [LayerMapping((gene,), 11) for gene in range(12)]
    two = [LayerMapping(genes, 11) for genes in itertools.product(range(12), repeat=2)]
    genomes = [MappingPair(*maps) for maps in itertools.product(two, two)]
    genomes += [
        MappingPair(*maps, layers)
        for *maps, layers in itertools.product(one, one, [None, *((gene,) for gene in range(12))])
    ]
    names = {genome.file_name for genome in genomes}
    assert len(names) == len(set(genomes)) == 12**4 + 12**2 * 13
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3-6/", r"genomes: '3-6/' has nothing after the slash; write HIDDEN/ATTENTION, or one mapping"),
        ("/3-6", r"genomes='' is not a layer mapping"),
        ("3-6/1-2/4-5", r"genomes='1-2/4-5' is not a layer mapping"),
        ("3-6/1-2-3", r"genomes='1-2-3' has 3 layers, but the student has 2"),
        ("1-2-3/3-6", r"genomes='1-2-3' has 3 layers, but the student has 2"),
        ("3-6/1-13", r"genomes: mapping 1-13: student layer 2 names teacher layer 13"),
        ("3-6/unifrom", r"genomes='unifrom' is not a layer mapping"),
        ("random:x/3-6", r"genomes='random:x': the seed after 'random:' must be a whole number"),
        ("@3-6", r"genomes='' is not a layer mapping"),
        ("1-2@", r"genomes='' is not a layer mapping"),
        ("1-2@/3-6", r"genomes='' is not a layer mapping"),
        ("1-2@3-6@3-6", r"genomes='1-2@3-6' is not a layer mapping"),
        ("3-6/1-2@3-6", r"genomes='3-6/1-2' is not a layer mapping"),
        ("3-6/1-2@", r"genomes='' is not a layer mapping"),
        ("1-2-3@3-6", r"genomes='1-2-3' has 3 layers, but the student has 2"),
        ("1-13@3-6", r"genomes: mapping 1-13: student layer 2 names teacher layer 13"),
    ],
)
def test_what_is_no_genome_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match="^" + says) as error:
        MappingPair.parse(text, student_layers=2, teacher_layers=12, key="genomes")
    assert "\n" not in str(error.value)


def test_last_needs_enough_teacher_layers_on_either_side() -> None:
    for text in ("last/1-1-1", "1-1-1/first", "last@1-1-1"):
        with pytest.raises(UserError, match=r"^genomes='(last|first)' needs at least as many teacher layers"):
            MappingPair.parse(text, student_layers=3, teacher_layers=2, key="genomes")


def test_two_texts_of_a_configuration_each_have_their_key() -> None:
    sizes = {"student_layers": 2, "teacher_layers": 12}
    assert str(MappingPair.from_texts("uniform", None, **sizes)) == "6-12"
    assert str(MappingPair.from_texts("uniform", "none", **sizes)) == "6-12/0-0"
    for texts, says in (
        (("1-2/3-4", None), r"^mapping.hidden='1-2/3-4' .*: mapping.hidden=1-2, mapping.attention=3-4$"),
        (("1-2@3-4", None), r"^mapping.hidden='1-2@3-4' is the text of a .*: student.init=1-2, mapping.hidden=3-4$"),
        (("1-2", "1-2-3"), r"^mapping.attention='1-2-3' has 3 layers"),
    ):
        with pytest.raises(UserError, match=says):
            MappingPair.from_texts(*texts, **sizes)


@st.composite
def layers_to_draw(draw: st.DrawFn) -> RandomEachStep:
    N = draw(st.integers(1, 24))
    M = draw(st.integers(1, N))
    found = MappingPair.from_texts("random-each-step", None, student_layers=M, teacher_layers=N).hidden
    assert isinstance(found, RandomEachStep)
    return found


@given(layers_to_draw(), st.integers(0, 99), st.integers(0, 10**6))
def test_a_draw_is_sorted_and_distinct_and_a_function_of_seed_and_step(
    layers: RandomEachStep, seed: int, step: int
) -> None:
    drawn = layers.drawn(seed, step)
    assert list(drawn.genes) == sorted(set(drawn.genes))
    assert (drawn.student_layers, drawn.teacher_layers) == (layers.student_layers, layers.teacher_layers)
    assert len(drawn.pairs) == drawn.student_layers, "no layer is skipped"
    again = RandomEachStep.from_sizes(
        student_layers=layers.student_layers, teacher_layers=layers.teacher_layers, key="mapping.hidden"
    )
    assert again.drawn(seed, step) == drawn


@given(layers_to_draw(), st.integers(0, 99), st.integers(0, 10**6))
def test_every_pair_that_can_be_drawn_is_in_a_window(layers: RandomEachStep, seed: int, step: int) -> None:
    pairs = {pair for window in layers.windows for pair in window.pairs}
    assert set(layers.drawn(seed, step).pairs) <= pairs
    assert set(layers.pairs) <= pairs, "so are those of held-out losses"
    assert max(max(window.genes) for window in layers.windows) == layers.teacher_layers


def test_every_teacher_layer_is_drawn_as_often() -> None:
    layers = RandomEachStep.from_sizes(student_layers=4, teacher_layers=12, key="mapping.hidden")
    steps = 6000
    counts = Counter(g for step in range(steps) for g in layers.drawn(7, step).genes)
    assert set(counts) == set(range(1, 13))
    deviation = (steps * (1 / 3) * (2 / 3)) ** 0.5
    assert all(abs(count - steps / 3) < 4.5 * deviation for count in counts.values())
    assert len({layers.drawn(7, step) for step in range(steps)}) == 495, "all of 12 choose 4"
    assert [layers.drawn(7, step) for step in range(9)] != [layers.drawn(8, step) for step in range(9)]
    assert str(layers.drawn(7, 0)) == "1-6-10-12", "runs that are continued by another version draw the same"


def test_random_each_step_is_no_genome_and_has_its_limits() -> None:
    sizes = {"student_layers": 2, "teacher_layers": 12}
    pair = MappingPair.from_texts("random-each-step", None, **sizes)
    assert (str(pair), pair.separate) == ("random-each-step", False)
    assert pair.hidden.genes == (6, 12), "without a step"
    assert pair.hidden != LayerMapping((6, 12), 12)
    for text in ("random-each-step", "1-2/random-each-step", "random-each-step@1-2"):
        with pytest.raises(UserError, match=r"^genomes='random-each-step' is not a fixed mapping"):
            MappingPair.parse(text, **sizes, key="genomes")
    with pytest.raises(UserError, match=r"^mapping.attention='random-each-step' is not a fixed mapping"):
        MappingPair.from_texts("1-2", "random-each-step", **sizes)
    with pytest.raises(UserError, match=r"^mapping.hidden='random-each-step' .* 3 student layers, .* has 2: take"):
        MappingPair.from_texts("random-each-step", None, student_layers=3, teacher_layers=2)


def test_the_text_of_kept_layers_is_that_of_student_init() -> None:
    sizes = {"student_layers": 2, "teacher_layers": 12, "key": "genomes"}
    assert MappingPair.parse("3-6", **sizes).kept is None
    assert MappingPair.parse("0-6@3-6", **sizes).kept == "0-6"
