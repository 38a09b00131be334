from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.mapping import LayerMapping, MappingPair, parse_mapping, round_half_up, uniform

GOLDEN = [  # (preset, M, N, text form)
    ("uniform", 4, 12, "3-6-9-12"),
    ("uniform", 6, 12, "2-4-6-8-10-12"),
    ("uniform", 3, 6, "2-4-6"),
    ("uniform", 5, 12, "2-5-7-10-12"),  # 2.4 4.8 7.2 9.6 12
    ("uniform", 4, 6, "2-3-5-6"),  # 1.5 and 4.5 go up
    ("uniform", 8, 12, "2-3-5-6-8-9-11-12"),
    ("last", 4, 12, "9-10-11-12"),
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
    assert mapping.deepest_teacher_layer == 10


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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3-6-9", "has 3 layers, but the student has 4"),
        ("3-6-9-13", "teacher layer 13"),
        ("3,6,9,12", "not a layer mapping"),
        ("unifrom", "uniform, last, first"),
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
    assert MappingPair.genes_in(str(pair)) == (pair.hidden.genes, pair.attention.genes)
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
    assert str(MappingPair.of_texts("uniform", None, **sizes)) == "6-12"
    assert str(MappingPair.of_texts("uniform", "none", **sizes)) == "6-12/0-0"
    for texts, says in (
        (("1-2/3-4", None), r"^mapping.hidden='1-2/3-4' is not a layer mapping"),
        (("1-2@3-4", None), r"^mapping.hidden='1-2@3-4' is not a layer mapping"),
        (("1-2", "1-2-3"), r"^mapping.attention='1-2-3' has 3 layers"),
    ):
        with pytest.raises(UserError, match=says):
            MappingPair.of_texts(*texts, **sizes)


def test_kept_layers_are_refused_with_their_remedy() -> None:
    sizes = {"student_layers": 2, "teacher_layers": 12, "key": "genomes"}
    MappingPair.parse("3-6", **sizes).refuse_kept_layers("genomes")
    with pytest.raises(UserError, match=r"^genomes='0-6@3-6': kept layers .*write student\.init=0-6 "):
        MappingPair.parse("0-6@3-6", **sizes).refuse_kept_layers("genomes")
