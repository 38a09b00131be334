"""Every kernel on a real GPU: values and gradients against float64, the same bits twice, memory, no waiting.

Without one these tests are skipped; what can be tested then is in the other files of this folder, by Triton's
interpreter and its compiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from implementations import Case, Tensors, make_case, packed, relative_error, value_and_gradients

from engine.kernels import reference
from engine.kernels.choice import Kernels
from engine.kernels.inputs import Attention, HiddenPairs, Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see the other tests of this folder"),
]
SHAPES = [(4, 12, 128, 26, 64), (4, 12, 128, 64, 64), (3, 4, 63, 26, 60), (2, 2, 512, 64, 64), (1, 2, 1000, 32, 64)]
"""Sequences, heads, length, head widths."""
KINDS = {
    "triton": Kernels("triton", "tile"),
    "tile": Kernels("torch", "tile"),
    "gram": Kernels("torch", "gram", torch.float64),
}
GRADIENT = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-4}
"""Relative errors (Frobenius) of gradients in the inputs' own dtype."""


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    tensors = tuple(x.to("cuda", dtype) for x in case.tensors)
    return Case(tensors, None if case.mask is None else case.mask.cuda(), case.scale_s, case.scale_t)  # type: ignore[arg-type]


def losses(kernels: Kernels, case: Case, rows: Rows) -> dict[str, Callable[[Tensors], torch.Tensor]]:
    def inputs(tensors: Tensors) -> Attention:
        return case.inputs(tensors)._replace(rows=rows)

    return {
        "scores": lambda tensors: kernels.attention_score_mse(inputs(tensors), pairs=case.pairs)[0],
        "KL": lambda tensors: kernels.softmax_kl(inputs(tensors), tokens=case.tokens),
    }


def wanted(case: Case) -> dict[str, list[torch.Tensor]]:
    functions: dict[str, Callable[[Tensors], torch.Tensor]] = {
        "scores": lambda tensors: reference.attention_score_mse(case.inputs(tensors), token_pairs=case.pairs),
        "KL": lambda tensors: reference.attention_probs_kl(case.inputs(tensors), tokens=case.tokens),
    }
    return {name: value_and_gradients(function, case.tensors, torch.float64) for name, function in functions.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_and_the_same_bits_twice(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool
) -> None:
    case = on_gpu(make_case(*shape, masked=masked), dtype)
    want = wanted(case)
    for loss, function in losses(KINDS[name], case, Rows(mask=case.mask)).items():
        got, again = (value_and_gradients(function, case.tensors, dtype) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), loss
        assert relative_error(want[loss][0], got[0]) <= 2e-5, loss
        for w, g in zip(want[loss][1:], got[1:], strict=True):
            assert relative_error(w, g) <= GRADIENT[dtype], loss


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_give_what_padded_ones_give(name: str) -> None:
    case = on_gpu(make_case(5, 4, 100, 26, 64, masked=True), torch.bfloat16)
    tensors, segments = packed(case)
    want = wanted(case)
    for loss, function in losses(KINDS[name], case, Rows(segments=segments)).items():
        got = value_and_gradients(function, tensors, torch.bfloat16)
        assert relative_error(want[loss][0], got[0]) <= 2e-5, loss
        for w, g in zip(want[loss][1:], got[1:], strict=True):
            spread = segments.padded(g, 2)
            assert relative_error(w[:, :, : spread.shape[2]], spread) <= 8e-3, loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("projected", [False, True])
def test_hidden_states(backend: str, projected: bool, masked: bool) -> None:
    make = torch.Generator().manual_seed(0)
    width = 312 if projected else 768
    states = [torch.randn(8, 100, width, generator=make).cuda().bfloat16() for _ in range(3)]
    targets = [torch.randn(8, 100, 768, generator=make).cuda().bfloat16() for _ in range(3)]
    weight = (torch.randn(768, 312, generator=make) * 312**-0.5).cuda().bfloat16() if projected else None
    mask = (torch.arange(100) < torch.randint(1, 101, (8, 1), generator=make)).cuda() if masked else None
    tokens = 800.0 if mask is None else float(mask.sum())

    def run(kernels: Kernels, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (*states, *([] if weight is None else [weight]))]
        of_teacher = [x.to(dtype) for x in targets]
        total, each = kernels.hidden_mse(
            HiddenPairs(leaves[:3], of_teacher, [0.5, 2.0, 1.0], tokens, mask, leaves[3] if projected else None)
        )
        total.backward()
        return [each, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    want, got, again = run(Kernels("reference"), torch.float64), *(run(Kernels(backend), torch.bfloat16) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert relative_error(want[0], got[0]) <= 1e-3
    assert max(relative_error(w, g) for w, g in zip(want[1:], got[1:], strict=True)) <= 8e-3


@pytest.mark.parametrize("name", KINDS)
def test_memory_of_the_attention_loss_does_not_grow_with_the_square_of_the_length(name: str) -> None:
    """Of two runs with as many tokens; score maps would take 16 times as much."""
    peaks = []
    for sequences, length in ((16, 512), (1, 8192)):
        case = on_gpu(make_case(sequences, 4, length, 64, 64, masked=False), torch.bfloat16)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value_and_gradients(losses(KINDS[name], case, Rows())["scores"], case.tensors, torch.bfloat16)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    bound = 1.1 * peaks[0] if name != "tile" else peaks[0] + 4 * 2**26 * 4  # tiles of a fixed number of entries
    assert peaks[1] <= bound, peaks


@pytest.mark.parametrize("name", KINDS)
def test_nothing_waits_for_the_device(name: str) -> None:
    case = on_gpu(make_case(4, 4, 100, 26, 64, masked=True), torch.bfloat16)
    functions = losses(KINDS[name], case, Rows(mask=case.mask))
    for function in functions.values():  # compiles
        value_and_gradients(function, case.tensors, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in functions.values():
            value_and_gradients(function, case.tensors, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
