"""Attention-score MSE and softmax KL, each implementation against the float64 reference: values and both gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from implementations import (
    ROUNDING,
    SCORES,
    SOFTMAX_KL,
    Case,
    Tensors,
    assert_equal_to,
    make_case,
    needs_triton,
    packed,
    relative_error,
    triton_attention,
    triton_kl,
    value_and_gradients,
)

from engine.kernels import attention_tile, reference
from engine.kernels.inputs import Attention, Rows

SHAPES = [(1, 1, 1, 8, 8), (2, 2, 63, 26, 60), (3, 2, 40, 16, 32)]
"""Sequences, heads, length, head widths."""
TRITON = "triton"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several, and the interpreter little to do."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(attention_tile.MAP_ENTRIES_AT_ONCE, "cpu", 1000)
    if triton_attention is not None:
        monkeypatch.setattr(triton_attention, "ROWS", 32)
        monkeypatch.setattr(triton_attention, "columns_of", lambda width: 16)
        monkeypatch.setattr(triton_kl, "ROWS", 32)
        monkeypatch.setattr(triton_kl, "COLUMNS", 16)


def wanted_scores(case: Case, *, tinybert: bool = False) -> list[torch.Tensor]:
    def compute(tensors: Tensors) -> torch.Tensor:
        if tinybert:
            positions = tensors[0].shape[0] * tensors[0].shape[2] ** 2
            return reference.attention_score_mse_tinybert(case.inputs(tensors), position_pairs=positions)
        return reference.attention_score_mse(case.inputs(tensors), token_pairs=case.pairs)

    return value_and_gradients(compute, case.tensors, torch.float64)


def got_scores(name: str, case: Case, dtype: torch.dtype, **more: object) -> list[torch.Tensor]:
    factor = 1.0 / (case.heads * case.pairs)

    def compute(tensors: Tensors) -> torch.Tensor:
        return SCORES[name](case.inputs(tensors), factor=factor, **more)[0]

    return value_and_gradients(compute, case.tensors, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_the_reference(name: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool) -> None:
    if name.startswith(TRITON) and dtype == torch.float64:
        pytest.skip("tensor cores have no float64; Kernels gives those to PyTorch")
    case = make_case(*shape, masked=masked)
    rounded = Case(tuple(x.to(dtype) for x in case.tensors), case.mask, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    got = got_scores(name, rounded, dtype)
    assert [g.dtype for g in got[1:]] == [dtype] * 2
    value = 1e-12 if dtype == torch.float64 else 2e-5
    assert_equal_to(wanted_scores(rounded), got, value=value, gradient=ROUNDING[dtype])


@pytest.mark.parametrize("name", [name for name in SCORES if not name.startswith("gram")])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_tinybert_equal_the_reference(name: str, masked: bool) -> None:
    case = make_case(2, 2, 40, 16, 32, masked=masked, poisoned=False)
    case = Case(tuple(20 * x for x in case.tensors), case.mask, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    B, _, L, _ = case.tensors[0].shape
    scores = case.tensors[0] @ case.tensors[1].mT * case.scale_s
    assert 0.05 < (scores < -100).float().mean() < 0.5, "the cut-off is at work"

    def compute(tensors: Tensors) -> torch.Tensor:
        factor = 1.0 / (case.heads * B * L * L)
        return SCORES[name](case.inputs(tensors), factor=factor, tinybert=True)[0]

    got = value_and_gradients(compute, case.tensors, torch.float32)
    assert_equal_to(wanted_scores(case, tinybert=True), got, value=2e-5, gradient=3e-6)


@pytest.mark.parametrize("name", SCORES)
def test_the_teachers_mean_square_comes_beside_the_loss(name: str) -> None:
    case = make_case(2, 2, 40, 16, 32, masked=True)
    factor = 1.0 / (case.heads * case.pairs)
    _, target = SCORES[name](case.inputs(case.tensors), factor=factor)
    nothing = torch.zeros_like(case.tensors[0][..., :1])
    want = reference.attention_score_mse(case.inputs((nothing, nothing, *case.tensors[2:])), token_pairs=case.pairs)
    assert float(target) == pytest.approx(float(want), rel=2e-5)
    assert not target.requires_grad


LIMITS = {"tile": (1e-4, 3e-4), "gram": (1.0, 1e-3), "gram, float64 sums": (1e-4, 1e-3)}
"""Value and gradient at the smallest noise in float32; measured for widths 64/64 and kappa 1.5: tile 2e-6 and 1e-4,
Gram in float32 8e-2 and 3e-4, with float64 sums 7e-10 and 2e-4."""


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", SCORES)
def test_accuracy_near_convergence(name: str, noise: float) -> None:
    """Where the maps nearly agree their difference is small against them, and rounding counts most."""
    case = make_case(2, 4, 64, 64, 64, masked=False, noise=noise, seed=3)
    want, got = wanted_scores(case), got_scores(name, case, torch.float32)
    value, gradient = LIMITS.get(name, LIMITS["tile"])
    assert relative_error(want[0], got[0]) <= value
    assert max(relative_error(w, g) for w, g in zip(want[1:], got[1:], strict=True)) <= gradient


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", SCORES)
def test_accuracy_near_convergence_in_bfloat16(name: str, noise: float) -> None:
    """Of gradients that are themselves rounded to 16 bits: not worse the closer the maps are."""
    case = make_case(2, 4, 64, 64, 64, masked=False, noise=noise, seed=3)
    rounded = Case(tuple(x.bfloat16() for x in case.tensors), None, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = got_scores(name, rounded, torch.bfloat16)
    want = wanted_scores(rounded)
    assert max(relative_error(w, g) for w, g in zip(want[1:], got[1:], strict=True)) <= 8e-3
    if name != "gram":
        assert relative_error(want[0], got[0]) <= 1e-4


def wanted_kl(case: Case) -> list[torch.Tensor]:
    return value_and_gradients(
        lambda tensors: reference.attention_probs_kl(case.inputs(tensors), tokens=case.tokens),
        case.tensors,
        torch.float64,
    )


def got_kl(name: str, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    factor = 1.0 / (case.heads * case.tokens)
    return value_and_gradients(
        lambda tensors: SOFTMAX_KL[name](case.inputs(tensors), factor=factor), case.tensors, dtype
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOFTMAX_KL)
def test_softmax_kl_equals_the_reference(name: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool) -> None:
    if name == TRITON and dtype == torch.float64:
        pytest.skip("tensor cores have no float64; Kernels gives those to PyTorch")
    case = make_case(*shape, masked=masked, empty=True)
    rounded = Case(tuple(x.to(dtype) for x in case.tensors), case.mask, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    got = got_kl(name, rounded, dtype)
    value = 1e-12 if dtype == torch.float64 else 2e-5
    assert_equal_to(wanted_kl(rounded), got, value=value, gradient=ROUNDING[dtype])


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", SOFTMAX_KL)
def test_softmax_kl_near_convergence(name: str, noise: float) -> None:
    """A difference of two products would be off by 2 %, 19 % and 140 % in bfloat16."""
    case = make_case(2, 2, 64, 32, 32, masked=False, noise=noise, seed=3)
    rounded = Case(tuple(x.bfloat16() for x in case.tensors), None, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    want, got = wanted_kl(rounded), got_kl(name, rounded, torch.bfloat16)
    assert max(relative_error(w, g) for w, g in zip(want[1:], got[1:], strict=True)) <= 8e-3


@needs_triton
def test_packed_sequences_give_what_padded_ones_give() -> None:
    case = make_case(3, 2, 40, 16, 32, masked=True)
    tensors, segments = packed(case)
    factor = 1.0 / (case.heads * case.pairs)
    want, want_kl = wanted_scores(case), wanted_kl(case)

    def scores(given: Tensors) -> torch.Tensor:
        return triton_attention.score_mse(case.inputs(given)._replace(rows=Rows(segments=segments)), factor=factor)[0]

    def kl(given: Tensors) -> torch.Tensor:
        factor = 1.0 / (case.heads * case.tokens)
        return triton_kl.softmax_kl(case.inputs(given)._replace(rows=Rows(segments=segments)), factor=factor)

    for wanted, function in ((want, scores), (want_kl, kl)):
        got = value_and_gradients(function, tensors, torch.float32)
        spread = [got[0], *(segments.padded(g, 2) for g in got[1:])]
        L = spread[1].shape[2]
        assert_equal_to([wanted[0], *(w[:, :, :L] for w in wanted[1:])], spread, value=2e-5, gradient=3e-6)


@pytest.mark.parametrize("name", SCORES)
def test_the_same_bits_twice_and_no_gradient_work_without_a_graph(name: str) -> None:
    case = make_case(2, 2, 33, 16, 16, masked=True)
    first, again = (got_scores(name, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    factor = 1.0 / (case.heads * case.pairs)
    alone, _ = SCORES[name](case.inputs(case.tensors), factor=factor)
    assert not alone.requires_grad
    assert torch.equal(alone, first[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SCORES)
def test_a_second_backward_pass_is_right_or_an_error(name: str, dtype: torch.dtype) -> None:
    """The first one scales the saved gradient where it lies, unless it has to be rounded: then the second is right."""
    case = make_case(1, 2, 20, 16, 16, masked=False)
    q, k, *teacher = (x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(case.tensors))
    value, _ = SCORES[name](case.inputs((q, k, *teacher)), factor=0.1)
    (first,) = torch.autograd.grad(value, q, retain_graph=True)
    first = first.clone()
    scaled_in_place = dtype == torch.float32 or name.startswith("triton")  # whose gradients are rounded already
    refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with refused if scaled_in_place else nullcontext():
        (second,) = torch.autograd.grad(2.0 * value, q)
        assert torch.equal(2.0 * first, second)


@pytest.mark.parametrize("L", [64, 256])
def test_memory_of_tiles_and_grams_does_not_grow_with_the_square_of_the_length(L: int) -> None:
    """The largest tensor that the autograd functions make, in entries, by length."""
    case = make_case(1, 2, L, 8, 8, masked=False)
    for name in ("tile", "gram"):
        with Largest() as seen:
            got_scores(name, case, torch.float32)
        assert seen.entries <= max(1000, 4 * 2 * L * 16), name


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return result


WINDOWS = [(3, None), (None, 3), (5, 9), (9, 5), (7, 7), (100, 100)]
"""Of student and teacher, at 40 tokens."""


def of_tokens(case: Case, window: int | None) -> list[list[tuple[list[int], list[list[int]]]]]:
    """Sequence -> real positions, and for each of them the real positions that it attends to."""
    B, _, L, _ = case.tensors[0].shape
    found = []
    for b in range(B):
        real = [i for i in range(L) if case.mask is None or case.mask[b, i]]
        found.append([(i, [j for j in real if window is None or abs(i - j) <= window]) for i in real])
    return found  # type: ignore[return-value]


def row_scores(q: torch.Tensor, k: torch.Tensor, scale: float, b: int, i: int, keys: list[int]) -> torch.Tensor:
    """(H, keys) scores of one query."""
    return torch.einsum("hd,hjd->hj", q[b, :, i], k[b, :, keys]) * scale


def scores_by_hand(case: Case, window: int | None) -> list[torch.Tensor]:
    """One query at a time, in float64."""

    def compute(tensors: Tensors) -> torch.Tensor:
        q_s, k_s, q_t, k_t = tensors
        total, pairs = q_s.new_zeros(()), 0
        for b, rows in enumerate(of_tokens(case, window)):
            for i, keys in rows:
                gap = row_scores(q_s, k_s, case.scale_s, b, i, keys) - row_scores(q_t, k_t, case.scale_t, b, i, keys)
                total, pairs = total + gap.square().sum(), pairs + len(keys)
        return total / (case.heads * pairs)

    return value_and_gradients(compute, case.tensors, torch.float64)


def kl_by_hand(case: Case, window_s: int | None, window_t: int | None) -> list[torch.Tensor]:
    """One query at a time, in float64: the student's probabilities over its window, the teacher's over the part of its
    own that lies in the student's."""
    both = min((w for w in (window_s, window_t) if w is not None), default=None)

    def compute(tensors: Tensors) -> torch.Tensor:
        q_s, k_s, q_t, k_t = tensors
        total = q_s.new_zeros(())
        for b, rows in enumerate(of_tokens(case, window_s)):
            for (i, keys), (_, keys_t) in zip(rows, of_tokens(case, both)[b], strict=True):
                log_s = torch.log_softmax(row_scores(q_s, k_s, case.scale_s, b, i, keys), -1)
                log_t = torch.log_softmax(row_scores(q_t, k_t, case.scale_t, b, i, keys_t), -1)
                at = [keys.index(j) for j in keys_t]
                total = total + (log_t.exp() * (log_t - log_s[:, at])).sum()
        return total / (case.heads * case.tokens)

    return value_and_gradients(compute, case.tensors, torch.float64)


def in_window_pairs(case: Case, window: int | None) -> int:
    return sum(len(keys) for rows in of_tokens(case, window) for _, keys in rows)


def reference_scores(inputs: Attention, *, factor: float) -> tuple[torch.Tensor, None]:
    return reference.attention_score_mse(inputs, token_pairs=1.0 / factor / inputs.q_s.shape[1]), None


def reference_kl(inputs: Attention, *, factor: float) -> torch.Tensor:
    return reference.attention_probs_kl(inputs, tokens=1.0 / factor / inputs.q_s.shape[1])


KNOW_WINDOWS = {"reference": reference_scores} | {k: f for k, f in SCORES.items() if not k.startswith("gram")}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 3, 7, 100])
@pytest.mark.parametrize("name", KNOW_WINDOWS)
def test_scores_within_a_window_equal_the_formula(name: str, window: int, masked: bool) -> None:
    case = make_case(3, 2, 40, 16, 26, masked=masked, seed=window)
    factor = 1.0 / (case.heads * in_window_pairs(case, window))
    dtype = torch.float32 if name.startswith(TRITON) else torch.float64

    def compute(tensors: Tensors) -> torch.Tensor:
        return KNOW_WINDOWS[name](case.inputs(tensors, window_s=window, window_t=window), factor=factor)[0]

    got = value_and_gradients(compute, case.tensors, dtype)
    assert_equal_to(
        scores_by_hand(case, window), got, value=max(1e-12, 0.1 * ROUNDING[dtype]), gradient=ROUNDING[dtype]
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("name", ["reference", *SOFTMAX_KL])
def test_softmax_kl_within_windows_equals_the_formula(
    name: str, windows: tuple[int | None, int | None], masked: bool
) -> None:
    case = make_case(3, 2, 40, 16, 26, masked=masked, seed=4)
    factor = 1.0 / (case.heads * case.tokens)
    dtype = torch.float32 if name == TRITON else torch.float64
    function = reference_kl if name == "reference" else SOFTMAX_KL[name]

    def compute(tensors: Tensors) -> torch.Tensor:
        return function(case.inputs(tensors, window_s=windows[0], window_t=windows[1]), factor=factor)

    got = value_and_gradients(compute, case.tensors, dtype)
    wanted = kl_by_hand(case, *windows)
    assert_equal_to(wanted, got, value=max(1e-12, 2 * ROUNDING[dtype]), gradient=max(1e-12, 2 * ROUNDING[dtype]))


@pytest.mark.parametrize("name", [name for name in KNOW_WINDOWS if name != "reference"])
def test_scores_of_tinybert_within_a_window_equal_the_reference(name: str) -> None:
    case = make_case(2, 2, 40, 16, 32, masked=True, poisoned=False)
    case = Case(tuple(20 * x for x in case.tensors), case.mask, case.scale_s, case.scale_t)  # type: ignore[arg-type]
    positions = 2 * 40 * 40

    def wanted(tensors: Tensors) -> torch.Tensor:
        return reference.attention_score_mse_tinybert(case.inputs(tensors, window_s=6), position_pairs=positions)

    def compute(tensors: Tensors) -> torch.Tensor:
        factor = 1.0 / (case.heads * positions)
        return SCORES[name](case.inputs(tensors, window_s=6), factor=factor, tinybert=True)[0]

    want = value_and_gradients(wanted, case.tensors, torch.float64)
    assert_equal_to(want, value_and_gradients(compute, case.tensors, torch.float32), value=2e-5, gradient=3e-6)


@needs_triton
def test_packed_sequences_have_the_windows_of_padded_ones() -> None:
    case = make_case(3, 2, 40, 16, 26, masked=True)
    tensors, segments = packed(case)
    pairs, L = in_window_pairs(case, 5), segments.longest

    def scores(given: Tensors) -> torch.Tensor:
        factor = 1.0 / (case.heads * pairs)
        return triton_attention.score_mse(
            case.inputs(given, window_s=5)._replace(rows=Rows(segments=segments)), factor=factor
        )[0]

    def kl(given: Tensors) -> torch.Tensor:
        factor = 1.0 / (case.heads * case.tokens)
        return triton_kl.softmax_kl(
            case.inputs(given, window_s=9, window_t=5)._replace(rows=Rows(segments=segments)), factor=factor
        )

    for wanted, function in ((scores_by_hand(case, 5), scores), (kl_by_hand(case, 9, 5), kl)):
        got = value_and_gradients(function, tensors, torch.float32)
        spread = [got[0], *(segments.padded(g, 2) for g in got[1:])]
        assert_equal_to([wanted[0], *(w[:, :, :L] for w in wanted[1:])], spread, value=2e-5, gradient=6e-6)
