"""engine/kernels/reference.py against the formulas of docs/losses.md, written out here one sequence at a time.

The formulas below slice the real tokens out of each sequence instead of masking, and use float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch

from engine.kernels import reference
from engine.kernels.inputs import UNSCORED_LABEL, Attention, Rows, repeat_heads

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Largest difference / largest wanted magnitude. bfloat16: the rounding of the returned gradient."""

UPSTREAM = 0.37

Tensor = torch.Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are small: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real(mask: Tensor | None, batch: int, length: int) -> list[list[int]]:
    """The positions of the real tokens of each sequence."""
    if mask is None:
        return [list(range(length))] * batch
    return [[i for i in range(length) if mask[b, i]] for b in range(batch)]


def want_hidden_mse(s: Tensor, t: Tensor, mask: Tensor | None, tokens: float) -> Tensor:
    total = s.new_zeros(())
    for b, keep in enumerate(real(mask, *s.shape[:2])):
        total = total + torch.einsum("id,id->", *[s[b, keep] - t[b, keep]] * 2)
    return total / tokens / s.shape[2]


def want_hidden_cosine(s: Tensor, t: Tensor, mask: Tensor | None, tokens: float) -> Tensor:
    total = s.new_zeros(())
    for b, keep in enumerate(real(mask, *s.shape[:2])):
        dots = torch.einsum("id,id->i", s[b, keep], t[b, keep])
        norms = (s[b, keep] ** 2).sum(1).sqrt() * (t[b, keep] ** 2).sum(1).sqrt()
        total = total + (1 - dots / norms).sum()
    return total / tokens


def scores_of(q: Tensor, k: Tensor, b: int, keep: list[int], scale: float) -> Tensor:
    """(H, n, n) of the n kept tokens of sequence b."""
    key_heads = [h * k.shape[1] // q.shape[1] for h in range(q.shape[1])]
    return torch.einsum("hid,hjd->hij", q[b][:, keep], k[b, key_heads][:, keep]) * scale


def want_attention_score_mse(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, scale_s: float, scale_t: float, mask: Tensor | None,
    token_pairs: float,
) -> Tensor:  # fmt: skip
    total, heads = q_s.new_zeros(()), q_s.shape[1]
    for b, keep in enumerate(real(mask, q_s.shape[0], q_s.shape[2])):
        difference = scores_of(q_s, k_s, b, keep, scale_s) - scores_of(q_t, k_t, b, keep, scale_t)
        total = total + (difference**2).sum()
    return total / heads / token_pairs


def want_attention_score_mse_tinybert(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, scale_s: float, scale_t: float, mask: Tensor | None,
    position_pairs: float,
) -> Tensor:  # fmt: skip
    batch, heads, length, _ = q_s.shape
    everything = list(range(length))
    total = q_s.new_zeros(())
    for b in range(batch):
        added = torch.zeros(length, dtype=torch.float64)
        if mask is not None:
            added[~mask[b]] = -10000.0
        sides = []
        for q, k, scale in ((q_s, k_s, scale_s), (q_t, k_t, scale_t)):
            scores = scores_of(q, k, b, everything, scale) + added
            sides.append(torch.where(scores <= -1e2, torch.zeros_like(scores), scores))
        total = total + ((sides[0] - sides[1]) ** 2).sum()
    return total / heads / position_pairs


def rows_kl(scores_t: Tensor, scores_s: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(scores_t) || softmax(scores_s))."""
    p_t, p_s = (torch.exp(x) / torch.exp(x).sum(-1, keepdim=True) for x in (scores_t, scores_s))
    return (p_t * torch.log(p_t / p_s)).sum()


def want_attention_probs_kl(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, scale_s: float, scale_t: float, mask: Tensor | None,
    tokens: float,
) -> Tensor:  # fmt: skip
    total, heads = q_s.new_zeros(()), q_s.shape[1]
    for b, keep in enumerate(real(mask, q_s.shape[0], q_s.shape[2])):
        total = total + rows_kl(scores_of(q_t, k_t, b, keep, scale_t), scores_of(q_s, k_s, b, keep, scale_s))
    return total / heads / tokens


def want_relation_kl(x_s: Tensor, x_t: Tensor, *, relation_heads: int, mask: Tensor | None, tokens: float) -> Tensor:
    total = x_s.new_zeros(())
    for b, keep in enumerate(real(mask, x_s.shape[0], x_s.shape[2])):
        sides = []
        for x in (x_s, x_t):
            joined = torch.cat([x[b, h][keep] for h in range(x.shape[1])], dim=1)
            width = joined.shape[1] // relation_heads
            parts = torch.stack([joined[:, r * width : (r + 1) * width] for r in range(relation_heads)])
            sides.append(torch.einsum("rid,rjd->rij", parts, parts) / math.sqrt(width))
        total = total + rows_kl(sides[1], sides[0])
    return total / relation_heads / tokens


def want_logits_kl(z_s: Tensor, z_t: Tensor, *, temperature: float, count: float) -> Tensor:
    return temperature**2 * rows_kl(z_t / temperature, z_s / temperature) / count


def want_mlm_cross_entropy(z_s: Tensor, labels: Tensor, *, count: float) -> Tensor:
    total = z_s.new_zeros(())
    for p, label in enumerate(labels.tolist()):
        total = total - (z_s[p, label] - torch.log(torch.exp(z_s[p]).sum()))
    return total / count


@dataclass
class Case:
    got: Callable[..., Tensor]
    want: Callable[..., Tensor]
    tensors: list[Tensor]
    """Inputs with a gradient, float64."""
    extra: tuple[object, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    mask: Tensor | None = None


def randn(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)) * size


def make_mask(batch: int, length: int, kind: str) -> Tensor | None:
    """None; about 30 % padding in random places; or lengths, with the last sequence fully padded."""
    if kind == "none":
        return None
    rng = np.random.default_rng(7)
    if kind == "scattered":
        mask = rng.random((batch, length)) > 0.3
        mask[0, 0] = True
        return torch.from_numpy(mask)
    lengths = rng.integers(1, length + 1, batch)
    lengths[-1] = 0
    if batch > 1:
        lengths[0] = length
    return torch.from_numpy(np.arange(length)[None] < lengths[:, None])


def counts(mask: Tensor | None, batch: int, length: int) -> tuple[float, float]:
    """Tokens and token pairs of a global batch 1.5 times as large as this micro batch."""
    lengths = np.full(batch, length) if mask is None else mask.sum(1).numpy()
    return 1.5 * float(lengths.sum()), 1.5 * float((lengths**2).sum())


ATTENTION_SHAPES = {
    "tiny": (2, 2, 5, 3, 4, 2, 2),
    "odd": (3, 3, 63, 26, 60, 3, 3),
    "twelve heads": (2, 12, 17, 26, 64, 12, 12),
    "grouped keys": (2, 12, 13, 26, 32, 4, 2),
    "one token": (2, 3, 1, 5, 7, 3, 3),
}
"""B, H, L, d_s, d_t, key heads of the student, of the teacher"""
HIDDEN_SHAPES = {"tiny": (2, 5, 4), "odd": (3, 63, 60), "tinybert": (2, 31, 312), "one token": (2, 1, 8)}
RELATION_SHAPES = {
    "tiny": (2, 5, 2, 3, 3, 4, 6),
    "other heads": (2, 63, 12, 26, 10, 60, 12),
    "48 relation heads": (2, 17, 4, 96, 12, 64, 48),
}
"""B, L, H_s, d_s, H_t, d_t, relation heads"""
MASKS = ("none", "scattered", "a sequence of padding")


def hidden_case(name: str, shape: str, mask_kind: str) -> Case:
    B, L, D = HIDDEN_SHAPES[shape]
    mask = make_mask(B, L, mask_kind)
    tensors = [randn(B, L, D, seed=1), randn(B, L, D, seed=2, size=1.3)]
    tokens, _ = counts(mask, B, L)
    return Case(getattr(reference, name), globals()[f"want_{name}"], tensors, (mask, tokens), {}, mask)


def of_attention(
    name: str, *tensors: Tensor, scale_s: float, scale_t: float, mask: Tensor | None, **divisor: float
) -> Tensor:
    """Returns what the reference makes of these inputs."""
    return getattr(reference, name)(Attention(*tensors, scale_s, scale_t, rows=Rows(mask)), **divisor)


def attention_case(name: str, shape: str, mask_kind: str) -> Case:
    B, H, L, d_s, d_t, K_s, K_t = ATTENTION_SHAPES[shape]
    mask = make_mask(B, L, mask_kind)
    tokens, pairs = counts(mask, B, L)
    size = 6.0 if name.endswith("tinybert") else 1.0  # some scores of real tokens fall below -100
    tensors = [
        randn(B, heads, L, d, seed=seed, size=size)
        for seed, (heads, d) in enumerate(((H, d_s), (K_s, d_s), (H, d_t), (K_t, d_t)))
    ]
    divisor = {
        "attention_score_mse": {"token_pairs": pairs},
        "attention_score_mse_tinybert": {"position_pairs": 1.5 * B * L * L},
        "attention_probs_kl": {"tokens": tokens},
    }[name]
    options = {"scale_s": d_s**-0.5, "scale_t": 0.8 * d_t**-0.5, "mask": mask, **divisor}
    return Case(partial(of_attention, name), globals()[f"want_{name}"], tensors, (), options, mask)


def relation_case(name: str, shape: str, mask_kind: str) -> Case:
    B, L, H_s, d_s, H_t, d_t, heads = RELATION_SHAPES[shape]
    mask = make_mask(B, L, mask_kind)
    tensors = [randn(B, H_s, L, d_s, seed=1), randn(B, H_t, L, d_t, seed=2)]
    options = {"relation_heads": heads, "mask": mask, "tokens": counts(mask, B, L)[0]}
    return Case(reference.relation_kl, want_relation_kl, tensors, (), options, mask)


def logits_case(name: str, shape: str, mask_kind: str) -> Case:
    tensors = [randn(7, 101, seed=1, size=3.0), randn(7, 101, seed=2, size=3.0)]
    return Case(reference.logits_kl, want_logits_kl, tensors, (), {"temperature": float(shape), "count": 9.5})


def mlm_case(name: str, shape: str, mask_kind: str) -> Case:
    labels = torch.from_numpy(np.random.default_rng(3).integers(0, 101, 7))
    tensors = [randn(7, 101, seed=1, size=3.0)]
    return Case(reference.mlm_cross_entropy, want_mlm_cross_entropy, tensors, (labels,), {"count": 9.5})


PADDED_CASES = [
    *[(hidden_case, name, shape) for name in ("hidden_mse", "hidden_cosine") for shape in HIDDEN_SHAPES],
    *[
        (attention_case, name, shape)
        for name in ("attention_score_mse", "attention_score_mse_tinybert", "attention_probs_kl")
        for shape in ATTENTION_SHAPES
    ],
    *[(relation_case, "relation_kl", shape) for shape in RELATION_SHAPES],
]
ALL_CASES = [
    *[(*case, mask) for case in PADDED_CASES for mask in MASKS],
    *[(logits_case, "logits_kl", temperature, "none") for temperature in ("1", "2.5")],
    (mlm_case, "mlm_cross_entropy", "", "none"),
]


def value_and_grads(function: Callable[..., Tensor], case: Case, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves, *case.extra, **case.options)
    value.backward(torch.tensor(UPSTREAM, dtype=value.dtype))
    return value.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


def assert_close(what: str, want: Tensor, got: Tensor, tolerance: float) -> None:
    assert torch.isfinite(got).all(), f"{what} is not finite"
    worst = (want.double() - got.double()).abs().max().item()
    largest = want.abs().max().item()
    if largest < 1e-12:  # 0 by the formula (the softmax of one score): both sides are rounding
        largest = 1.0
    assert worst <= tolerance * largest, f"{what}: differs by {worst:.3g} where the largest is {largest:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("make", "name", "shape", "mask"), ALL_CASES)
def test_value_and_gradients_match_the_formula(make, name, shape, mask, dtype):
    case = make(name, shape, mask)
    rounded = [x.to(dtype) for x in case.tensors]
    want, want_grads = value_and_grads(case.want, case, [x.double() for x in rounded])
    got, got_grads = value_and_grads(case.got, case, rounded)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("value", want, got, TOLERANCE[got.dtype])  # a float32 sum whatever the inputs are
    for index, (a, b) in enumerate(zip(want_grads, got_grads, strict=True)):
        assert b.dtype == dtype
        assert_close(f"gradient {index}", a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("make", "name", "shape"), [case for case in PADDED_CASES if case[2] == "tiny"])
def test_gradients_match_finite_differences(make, name, shape, mask):
    case = make(name, shape, mask)
    leaves = [(0.5 * x).requires_grad_() for x in case.tensors]
    assert torch.autograd.gradcheck(lambda *xs: case.got(*xs, *case.extra, **case.options), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize(("make", "name", "shape"), [case for case in PADDED_CASES if not case[1].endswith("tinybert")])
def test_poisoned_padding_changes_nothing(make, name, shape, mask, dtype):
    case = make(name, shape, mask)
    assert case.mask is not None
    clean = [x.to(dtype) for x in case.tensors]
    want, want_grads = value_and_grads(case.got, case, clean)
    hidden = case.tensors[0].dim() == 3
    padded = ~(case.mask[:, :, None] if hidden else case.mask[:, None, :, None])
    for poison in (float("nan"), float("inf")):
        got, got_grads = value_and_grads(case.got, case, [x.masked_fill(padded, poison) for x in clean])
        assert torch.equal(got, want)
        for a, b in zip(want_grads, got_grads, strict=True):
            assert torch.equal(a, b)
            assert not b.masked_select(padded).any(), "a padded position has a gradient"


@pytest.mark.parametrize(("make", "name", "shape", "mask"), ALL_CASES)
def test_autocast_does_not_lower_the_precision(make, name, shape, mask):
    case = make(name, shape, mask)
    tensors = [x.float() for x in case.tensors]
    want = case.got(*tensors, *case.extra, **case.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.got(*tensors, *case.extra, **case.options), want)


@pytest.mark.parametrize("name", ["attention_score_mse", "attention_probs_kl"])
def test_padding_to_a_longer_length_changes_nothing(name):
    case = attention_case(name, "odd", "none")
    want, want_grads = value_and_grads(case.got, case, case.tensors)
    B, _, L, _ = case.tensors[0].shape
    longer = [torch.cat([x, torch.full_like(x[:, :, :9], float("nan"))], dim=2) for x in case.tensors]
    case.options["mask"] = (torch.arange(L + 9) < L).expand(B, -1)
    got, got_grads = value_and_grads(case.got, case, longer)
    assert_close("value", want, got, TOLERANCE[torch.float64])
    for a, b in zip(want_grads, got_grads, strict=True):
        assert_close("gradient", a, b[:, :, :L], TOLERANCE[torch.float64])
        assert not b[:, :, L:].any()


def test_no_rows_give_a_differentiable_zero():
    z_s, z_t = torch.zeros(0, 11, requires_grad=True), torch.zeros(0, 11)
    for count in (5.0, 0.0):
        kl = reference.logits_kl(z_s, z_t, temperature=2.0, count=count)
        ce = reference.mlm_cross_entropy(z_s, torch.zeros(0, dtype=torch.long), count=count)
        (kl + ce).backward()
        assert kl.item() == ce.item() == 0.0
        assert z_s.grad is not None


def test_mlm_ignores_unlabelled_rows_even_if_they_are_not_finite():
    case = mlm_case("", "", "")
    labels = torch.cat([case.extra[0], torch.tensor([UNSCORED_LABEL])])
    z = torch.cat([case.tensors[0], torch.full((1, 101), float("nan"))]).requires_grad_()
    value = reference.mlm_cross_entropy(z, labels, **case.options)
    value.backward()
    assert_close("value", case.want(*case.tensors, *case.extra, **case.options), value.detach(), 1e-12)
    assert not z.grad[-1].any()


def test_identical_models_have_no_loss():
    q, k = randn(2, 4, 9, 8, seed=1), randn(2, 4, 9, 8, seed=2)
    mask = make_mask(2, 9, "scattered")
    scales = {"scale_s": 0.3, "scale_t": 0.3, "mask": mask}
    assert of_attention("attention_score_mse", q, k, q, k, token_pairs=10, **scales) == 0
    assert of_attention("attention_probs_kl", q, k, q, k, tokens=10, **scales) == 0
    assert reference.relation_kl(q, q, relation_heads=2, mask=mask, tokens=10) == 0


def test_shapes_that_would_broadcast_are_refused():
    one, four = randn(2, 1, 9, 8, seed=1), randn(2, 4, 9, 8, seed=2)
    scales = {"scale_s": 1.0, "scale_t": 1.0, "mask": None}
    for call in (
        lambda: of_attention("attention_score_mse", one, one, four, four, token_pairs=1, **scales),
        lambda: of_attention("attention_score_mse_tinybert", one, one, four, four, position_pairs=1, **scales),
        lambda: of_attention("attention_probs_kl", one, one, four, four, tokens=1, **scales),
        lambda: reference.hidden_mse(one[:, 0, :, :1], one[:, 0], None, 1),
        lambda: reference.hidden_cosine(one[:, 0, :, :1], one[:, 0], None, 1),
        lambda: reference.logits_kl(one[0, 0, :1], one[0, 0], temperature=1, count=1),
    ):
        with pytest.raises(ValueError, match="student and teacher differ"):
            call()
    with pytest.raises(ValueError, match="cannot share 3 key heads"):
        repeat_heads(randn(1, 3, 2, 2, seed=1), 4)
    with pytest.raises(ValueError, match="relation_heads=5 does not divide the width 32"):
        reference.relation_kl(four, four, relation_heads=5, mask=None, tokens=1)
    with pytest.raises(ValueError, match="positive count"):
        reference.hidden_mse(one, one, None, 0)


def test_every_reference_function_is_tested_here():
    tested = {case[1] for case in ALL_CASES}
    public = {
        name for name in vars(reference) if getattr(getattr(reference, name), "__module__", "") == reference.__name__
    }
    shared = {"without_padding", "outside"}
    assert {name for name in public if not name.startswith("_")} - shared == tested
