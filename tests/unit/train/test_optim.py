"""Optimizers and schedules against their formulas in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from engine.config.deepspeed import resolve_execution
from engine.config.deepspeed_file import FOLDER
from engine.config.distill import OptimConfig, TrainConfig
from engine.config.finetune import FineTrainConfig
from engine.errors import UserError
from engine.train.optim import Lamb, build_optimizer, parameter_groups
from engine.train.schedule import build_schedule


def lamb_by_the_paper(w, grads, lr, betas, eps, decay):
    """Algorithm 2 of arXiv 1904.00962 for one tensor, written out in float64."""
    b1, b2 = betas
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        r = (m / (1 - b1**t)) / (torch.sqrt(v / (1 - b2**t)) + eps) + decay * w
        ratio = w.norm() / r.norm() if w.norm() > 0 and r.norm() > 0 else 1.0
        w = w - lr * ratio * r
    return w


@pytest.mark.parametrize("zero_weight", [False, True])
def test_lamb_follows_the_paper(zero_weight: bool) -> None:
    torch.manual_seed(0)
    start = torch.zeros(7, 5, dtype=torch.float64) if zero_weight else torch.randn(7, 5, dtype=torch.float64)
    grads = [torch.randn(7, 5, dtype=torch.float64) for _ in range(6)]
    p = nn.Parameter(start.clone())
    optimizer = Lamb([p], lr=0.03, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    want = lamb_by_the_paper(start, grads, 0.03, (0.9, 0.99), 1e-6, 0.1)
    torch.testing.assert_close(p.data, want, rtol=1e-12, atol=1e-12)


def test_biases_and_norms_do_not_decay() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Embedding(5, 3))
    module[0].weight.requires_grad_(True)
    decayed, plain = parameter_groups(module, 0.01)
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 3


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 35: 0.5 * (1 + math.cos(math.pi / 4)), 110: 0.0}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 110: 1.0}),
        ("warmup_stable_decay", {0: 0.0, 5: 0.5, 10: 1.0, 88: 1.0, 89: 21 / 22, 99: 0.5, 109: 1 / 22, 110: 0.0}),
    ],
)
def test_schedules(name: str, at: dict[int, float]) -> None:
    found = rates(TrainConfig(steps=110, warmup_steps=10, schedule=name, lr=2.0))
    assert [found[step] for step in at] == pytest.approx([2.0 * rate for rate in at.values()], abs=1e-9)


def rates(config: TrainConfig) -> list[float]:
    """The learning rate of each step, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(config, optimizer)
    found = []
    for _ in range(config.steps + 1):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("steps", "share", "decay"), [(60, 0.2, 12), (47, 0.3, 14), (30, 0.01, 1), (10, 1.0, 10)])
def test_the_decay_is_that_of_transformers(steps: int, share: float, decay: int) -> None:
    config = TrainConfig(steps=steps, warmup_steps=0, schedule="warmup_stable_decay", decay_share=share, lr=2.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    theirs = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=0,
        num_training_steps=steps,
        scheduler_specific_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
    )
    for rate in rates(config):
        assert rate == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_runs_of_different_lengths_are_one_run_up_to_their_decays() -> None:
    """What makes horizons comparable."""
    short, long = (
        rates(TrainConfig(steps=steps, warmup_steps=7, schedule="warmup_stable_decay", decay_share=0.25))
        for steps in (40, 160)
    )
    assert short[:31] == long[:31]
    assert long[7:121] == [long[7]] * 114


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"decay_share": 0.2}, "(?s)train.decay_share=0.2: remove it.*'linear'"),
        ({"schedule": "warmup_stable_decay", "decay_share": 0.0}, r"must be in \(0, 1\]"),
        (
            {"schedule": "warmup_stable_decay", "decay_share": 1.0, "warmup_steps": 1},
            "must not exceed the number of steps, 300",
        ),
    ],
)
def test_a_decay_that_cannot_be_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        TrainConfig(**settings)
    if "warmup_steps" not in settings:
        with pytest.raises(UserError, match=match):
            FineTrainConfig(**settings)


def build(name: str, ds: Path):
    execution = resolve_execution(TrainConfig(), OptimConfig(name=name), ds, 1)
    module = nn.Linear(3, 3)
    return build_optimizer(OptimConfig(name=name), module, lr=1e-3, execution=execution, device=torch.device("cpu"))


def test_cpu_takes_the_fused_adamw_and_says_why_lamb_is_plain() -> None:
    adamw = build("adamw", FOLDER / "zero1_bf16.json")
    assert isinstance(adamw.optimizer, torch.optim.AdamW)
    assert adamw.optimizer.defaults["fused"] is True
    assert adamw.why_not_faster == ""
    lamb = build("lamb", FOLDER / "zero0_fp32.json")
    assert isinstance(lamb.optimizer, Lamb)
    assert "CUDA" in lamb.why_not_faster


@pytest.mark.parametrize("name", ["apex_fused_adam", "apex_fused_lamb"])
def test_apex_asked_for_and_missing_says_how_to_build_it(name: str) -> None:
    try:
        import apex.multi_tensor_apply  # noqa: F401

        pytest.skip("NVIDIA Apex is installed here")
    except ImportError:
        pass
    with pytest.raises(UserError, match=r"(?s)optim.name='apex_fused_.*github.com/NVIDIA/apex"):
        build(name, FOLDER / "zero0_fp32.json")
