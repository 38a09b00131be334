import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.mapping import LayerMapping, parse_mapping, round_half_up, uniform

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
