"""One seed and one global batch give one loss curve, however the work is split."""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import relative_gap
from launching import write_ds_config

pytestmark = pytest.mark.launcher

FP32, BF16, FP16 = 1e-5, 2e-2, 2e-3
"""Relative tolerance of losses: sums in another order; 8 and 11 bits of mantissa over 6 updates."""


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("fp32", FP32),
        ("bf16", BF16),
        pytest.param("fp16", FP16, marks=[pytest.mark.fp16, pytest.mark.thorough]),
    ],
)
def test_zero_stages_give_one_curve_on_two_ranks(finished_run, precision: str, tolerance: float) -> None:
    curves, norms = {}, {}
    first, *others = (0, 1, 2, 3) if precision != "fp16" else (1, 2, 3)  # fp16 has no stage 0
    for stage in (first, *others):
        run = finished_run(stage=stage, precision=precision, ranks=2, micro=2)
        curves[stage], norms[stage] = run.curve(), run.curve("grad_norm")
    gaps = {stage: relative_gap(curves[first], curves[stage]) for stage in others}
    norm_gaps = {stage: relative_gap(norms[first], norms[stage]) for stage in others}
    print(f"{precision}: largest relative gap to stage {first}: loss {gaps}, gradient norm {norm_gaps}")
    assert curves[first][-1] < 0.97 * curves[first][0], "nothing was learnt, so equality says nothing"
    assert max(gaps.values()) < tolerance
    assert max(norm_gaps.values()) < 10 * tolerance


def test_the_gradient_does_not_depend_on_the_split(finished_run) -> None:
    """1x8, 2x4 and 8x1 (accumulation x micro batch), on one rank and on two, over padded sequences."""
    splits = {"1x8": (1, 8), "2x4": (1, 4), "8x1": (1, 1), "2 ranks 2x2": (2, 2), "2 ranks 4x1": (2, 1)}
    losses, norms, weights = {}, {}, {}
    for name, (ranks, micro) in splits.items():
        run = finished_run(stage=1 if ranks > 1 else 0, precision="fp32", ranks=ranks, micro=micro)
        losses[name], norms[name], weights[name] = run.curve(), run.curve("grad_norm"), run.student()
    first = "1x8"
    for name in splits:
        assert relative_gap(losses[first], losses[name]) < FP32, name
        assert relative_gap(norms[first], norms[name]) < FP32, name
        for key, tensor in weights[first].items():
            torch.testing.assert_close(weights[name][key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
    print(
        {name: (relative_gap(losses[first], losses[name]), relative_gap(norms[first], norms[name])) for name in splits}
    )


def test_random_layers_are_drawn_alike_on_all_ranks_and_micro_batches(finished_run) -> None:
    settings = {"precision": "fp32", "mapping__hidden": "random-each-step", "student__init": "uniform"}
    one = finished_run(stage=0, ranks=1, micro=8, **settings)
    two = finished_run(stage=1, ranks=2, micro=2, **settings)
    terms = [step["terms"] for step in one.steps()]
    assert {name for step in terms for name in step} == {
        "hidden/1-random", "hidden/2-random", "attention/1-random", "attention/2-random", "embedding",
    }  # fmt: skip
    for name in terms[0]:
        assert relative_gap([step[name] for step in terms], [step["terms"][name] for step in two.steps()]) < FP32, name
    assert relative_gap(one.curve(), two.curve()) < FP32
    assert relative_gap(one.curve("grad_norm"), two.curve("grad_norm")) < FP32
    fixed = finished_run(stage=0, ranks=1, micro=8, precision="fp32", student__init="uniform")
    assert relative_gap(fixed.curve(), one.curve()) > 1e-2, "other layers than those of one mapping"
    assert one.records("result")[-1]["mapping"] == {"hidden": "random-each-step", "attention": "random-each-step"}


def test_texts_of_a_batch_are_compared_over_all_ranks(finished_run) -> None:
    """loss.pooled with its KL of similarity: a micro batch of 8 on one rank, and of 4 on each of two."""
    settings = {"precision": "fp32", "loss__pooled": 1.0, "loss__pooled_weights": [1.0, 1.0, 1.0]}
    settings |= {"train__eval_every": 2}
    one = finished_run(stage=0, ranks=1, micro=8, **settings)
    two = finished_run(stage=1, ranks=2, micro=4, **settings)
    assert relative_gap(one.curve(), two.curve()) < FP32
    assert relative_gap(one.curve("grad_norm"), two.curve("grad_norm")) < FP32
    similarity = [step["terms"]["pooled/similarity"] for step in one.steps()]
    assert relative_gap(similarity, [step["terms"]["pooled/similarity"] for step in two.steps()]) < FP32
    rooms = [[record["vectors"] for record in run.records("step") if "vectors" in record] for run in (one, two)]
    assert len(rooms[0]) == len(rooms[1]) > 1
    for first, second in zip(*rooms, strict=True):
        for side, name in itertools.product(("student", "teacher"), ("cosine", "rank")):
            assert first[side][name] == pytest.approx(second[side][name], rel=1e-3), (side, name)


def test_activation_checkpointing_and_sharded_teacher_change_nothing(finished_run) -> None:
    settings = {"stage": 3, "precision": "fp32", "ranks": 2, "micro": 2}
    plain = finished_run(**settings)
    other = finished_run(student__activation_checkpointing=True, teacher__placement="zero3", **settings)
    assert relative_gap(plain.curve(), other.curve()) < FP32


@pytest.mark.fp16
@pytest.mark.parametrize(
    ("stage", "clip"),
    [
        (1, 100.0),
        (3, 1.0),
        pytest.param(1, 1.0, marks=pytest.mark.thorough),
        pytest.param(2, 1.0, marks=pytest.mark.thorough),
        pytest.param(2, 100.0, marks=pytest.mark.thorough),
        pytest.param(3, 100.0, marks=pytest.mark.thorough),
    ],
)
def test_fp16_follows_fp32(finished_run, stage: int, clip: float) -> None:
    """DeepSpeed alone halves the gradients of a step in which the loss scale grows, unless they are clipped."""
    runs = {}
    for precision in ("fp32", "fp16"):
        runs[precision] = finished_run(
            stage=0 if precision == "fp32" else stage,
            precision=precision,
            micro=4,
            train__grad_clip=clip,
        )
    norms = [run.curve("grad_norm") for run in runs.values()]
    assert 2 < min(norms[0]) < max(norms[0]) < 100, "one of the limits clips all, the other none"
    scales = runs["fp16"].curve("loss_scale")
    assert (scales[0], scales[-1]) == (256, 512), "the scale grows, and the curve does not feel it"
    assert runs["fp16"].curve("skipped_steps")[-1] == 0
    gap, norm_gap = relative_gap(runs["fp32"].curve(), runs["fp16"].curve()), relative_gap(*norms)
    print(f"fp16, stage {stage}, clip {clip}: largest gap to fp32: loss {gap:.1e}, gradient norm {norm_gap:.1e}")
    assert max(gap, norm_gap) < FP16


@pytest.mark.fp16
def test_fp16_overflow_halves_the_scale_and_skips_the_step(make_run, tmp_path) -> None:
    run = make_run("overflow", stage=1, precision="fp16")
    scaler = {"enabled": True, "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 1}
    ds = write_ds_config(tmp_path / "overflow ds", fp16=scaler, zero_optimization={"stage": 1})
    run.finish("--deepspeed_config", str(ds), "--train.steps", "40")
    steps = run.steps()
    assert steps[-1]["skipped_steps"] > 0
    assert steps[-1]["loss_scale"] < 2**32
    assert steps[-1]["total"] < steps[0]["total"], "training goes on once the scale fits"


def test_offload_runs_on_this_machine(finished_run) -> None:
    settings = {"stage": 3, "precision": "bf16", "ranks": 2, "micro": 2}
    offload = finished_run(
        zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}, **settings
    )
    assert "DeepSpeedCPUAdam" in offload.output
    assert relative_gap(finished_run(**settings).curve(), offload.curve()) < BF16
