"""The teacher's linear maps on a CPU: joined and laid out anew, they compute what they computed before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_encoders import make_batch, save_tiny, tiny_model
from torch import nn

from engine.models.capture import layer_modules
from engine.models.features import Wanted
from engine.models.frozen_linear import FrozenLinear, _Part, can_pack, freeze_linears
from engine.models.hub import SavedModel
from engine.models.install import install
from engine.models.teacher import FrozenTeacher

CPU = torch.device("cpu")
FAMILIES = ["bert", "roberta", "electra", "distilbert", "albert", "modernbert", "mpnet", "deberta-v2"]
pytestmark = pytest.mark.skipif(
    not can_pack(tiny_model("bert").bfloat16(), CPU), reason="this CPU has no native bfloat16 products"
)


def relative(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.float() - got.float()).norm() / want.float().norm())


@pytest.mark.parametrize("rows", [1, 7, 300, 1024, 1600])
@pytest.mark.parametrize(("features", "widths"), [(96, (40,)), (96, (40, 24, 40)), (3072, (64,))])
def test_one_product_for_several_maps(features: int, widths: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    maps = [nn.Linear(features, width, bias=width != 24).bfloat16() for width in widths]
    x = torch.randn(rows, features).bfloat16().view(1, rows, features)
    with torch.no_grad():
        got = FrozenLinear(maps)(x)
        for one, part in zip(maps, got.split(list(widths), dim=-1), strict=True):
            assert part.shape == (1, rows, one.out_features)
            assert relative(one(x), part) <= 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_did(family: str) -> None:
    model = tiny_model(family).bfloat16()
    install(model, "sdpa")
    batch = make_batch()
    with torch.no_grad():
        want = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        made = freeze_linears(model, layer_modules(model))
        got = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        again = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert batch.token_mask is not None
    assert relative(want[batch.token_mask], got[batch.token_mask]) <= 0.02
    assert torch.equal(got, again)
    assert made
    assert not [m for layer in layer_modules(model) for m in layer.modules() if type(m) is nn.Linear]
    if family == "bert":
        parts = [m for layer in layer_modules(model) for m in layer.modules() if isinstance(m, _Part)]
        assert len(parts) == 3 * 4, "queries, keys and values of each layer are one product"
        assert all(part._shared._input is None and not part._shared._outputs for part in parts), "nothing is kept"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_a_teacher_in_bfloat16_is_changed(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = Wanted(hidden=frozenset({1}), attention=frozenset({2}))
    teacher = FrozenTeacher.load(
        SavedModel.read("teacher.path", save_tiny("bert", tmp_path / "teacher")),
        wanted=wanted,
        dtype=dtype,
        device=CPU,
        backend="sdpa",
    )
    assert bool(teacher._frozen) == (dtype == torch.bfloat16)
    whole = sum(p.numel() * p.element_size() for p in teacher._model.parameters())
    assert teacher.resident_bytes() == whole + sum(one.bytes for one in teacher._frozen)
    assert teacher.parameters_count * torch.empty((), dtype=dtype).element_size() - teacher.resident_bytes() < 20_000
    features = teacher(make_batch())
    assert sorted(features.hidden) == [1]
    assert sorted(features.query) == [2]
