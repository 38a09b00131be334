"""Continuing with other ranks or another ZeRO stage: the curve of a run that never changed, and no sample skipped or
repeated (the order of samples is a function of the step alone; tests/unit/data/test_loader.py)."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from compare import relative_gap
from launching import Run, write_ds_config

from engine.records.run_dir import step_tag

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(1200)]

K = 4
FP32, SIXTEEN_BIT = 1e-6, 5e-3
"""Largest relative gap of a loss: sums over other splits, in other orders."""
STAGES, RANKS = (1, 2, 3), ((2, 1), (1, 2), (2, 3))
SOME = {(2, 1, (2, 3)), (2, 3, (2, 1)), (3, 3, (2, 3))}
CHANGES = [
    pytest.param(*change, marks=() if change in SOME else pytest.mark.thorough)
    for change in itertools.product(STAGES, STAGES, RANKS)
]
"""Stages and ranks before and after."""


def settings(stage: int, ranks: int, precision: str = "fp32") -> dict[str, object]:
    return {
        "stage": stage,
        "ranks": ranks,
        "precision": precision,
        "micro": 2,  # 6, 3 and 2 micro steps with 1, 2 and 3 ranks
        "train__global_batch": 12,
        "train__steps": 2 * K,
        "train__save_every": K,
        "train__schedule": "cosine",
    }


def continued(whole: Run, run: Run) -> Run:
    """`run`, which has other settings, finished from where `whole` was after K steps."""
    shutil.copytree(whole.output_dir, run.output_dir)
    shutil.rmtree(run.run_dir.checkpoints / step_tag(2 * K))
    shutil.rmtree(run.run_dir.student)
    run.finish()
    return run


def assert_one_curve(whole: Run, run: Run) -> None:
    assert [r["step"] for r in run.steps()] == [*range(1, 2 * K + 1), *range(K + 1, 2 * K + 1)]
    assert run.curve("lr") == whole.curve("lr")
    loss, norm = (relative_gap(whole.curve(key), run.curve(key)) for key in ("total", "grad_norm"))
    print(f"{run.output_dir.name}: largest relative gap: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss < FP32
    assert norm < 10 * FP32
    assert not list(run.run_dir.checkpoints.glob("universal-*")), "the conversion was removed"
    for key, weight in run.student().items():
        assert float((whole.student()[key] - weight).abs().max()) < 1e-5


@pytest.mark.parametrize(("before", "after", "ranks"), CHANGES)
def test_other_ranks_and_stages_continue_the_curve(
    make_run, finished_run, before: int, after: int, ranks: tuple[int, int]
) -> None:
    old, new = ranks
    whole = finished_run(**settings(before, old))
    run = continued(whole, make_run(f"ZeRO-{before} x {old} to ZeRO-{after} x {new}", **settings(after, new)))
    said = f"written by {old} rank{'s' * (old > 1)} under ZeRO-{before}, converted for {new} under ZeRO-{after}"
    assert said in run.output
    assert_one_curve(whole, run)


def test_one_rank_instead_of_two_through_the_real_launcher(make_run, finished_run) -> None:
    whole = finished_run(**settings(3, 2))
    run = continued(whole, make_run("ZeRO-3 x 2 to ZeRO-1 x 1", launcher="real", **settings(1, 1)))
    assert "written by 2 ranks under ZeRO-3, converted for 1 under ZeRO-1" in run.output
    assert_one_curve(whole, run)


@pytest.mark.thorough
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.fp16)])
def test_sixteen_bit_runs_too(make_run, finished_run, precision: str, before: int, after: int) -> None:
    """With a masked-LM head, whose weight is that of the embeddings."""
    head = {"data__mlm_probability": 0.15, "loss__mlm": 1.0}
    whole = finished_run(**settings(before, 2, precision), **head)
    run = continued(whole, make_run("other", **settings(after, 3, precision), **head))
    gap = relative_gap(whole.curve(), run.curve())
    print(f"{precision}: ZeRO-{before} x 2 to ZeRO-{after} x 3: largest relative gap {gap:.1e}")
    assert gap < SIXTEEN_BIT
    assert run.curve("loss_scale") == whole.curve("loss_scale")
    assert precision == "bf16" or len(set(run.curve("loss_scale"))) > 1, "the scale grows, so that a lost one is seen"


@pytest.mark.thorough
def test_another_layout_of_shards(make_run, finished_run) -> None:
    """The same ranks and stage, but DeepSpeed puts the parameters into their shards in another way: as they are they
    would not load."""
    whole = finished_run(**settings(3, 2))
    run = continued(whole, make_run("other", zero={"sub_group_size": 500}, **settings(3, 2)))
    assert "converted for 2 under ZeRO-3" in run.output
    gap = relative_gap(whole.curve(), run.curve())
    print(f"ZeRO-3 x 2, another sub_group_size: largest relative gap {gap:.1e}")
    assert gap < FP32


@pytest.mark.fp16
@pytest.mark.thorough
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (3, 1)])
def test_an_optimizer_without_a_step_is_not_converted(make_run, tmp_path: Path, before: int, after: int) -> None:
    """fp16 whose first steps all overflow: the converter would make a checkpoint of rounded weights, or a traceback."""
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 60}
    common = {"train__steps": 4, "train__save_every": 2}
    runs = [make_run(name, **common) for name in ("run", "other")]
    for run, stage in zip(runs, (before, after), strict=True):
        ds = write_ds_config(tmp_path / f"ds {stage} fp16", zero_optimization={"stage": stage}, fp16=fp16)
        run.argv[run.argv.index("--deepspeed_config") + 1] = str(ds)
    run, other = runs
    run.finish()
    other.output_dir = run.output_dir
    errors = [line for line in other.finish(expect=2).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "one whose optimizer has made a step" in errors[0]
    assert not list(run.run_dir.checkpoints.glob("universal-*"))


@pytest.mark.thorough
def test_shards_in_turns_stay_as_they_are(make_run) -> None:
    """Without the refusal, parameters are loaded into each other's places, and the next loss is off by a quarter."""
    in_turns = {"round_robin_gradients": True}
    whole = make_run("whole", zero=in_turns, **settings(2, 2))
    whole.finish()
    for name, zero, ranks in (("without", {}, 2), ("other ranks", in_turns, 3)):
        run = make_run(name, zero=zero, **settings(2, ranks))
        shutil.copytree(whole.output_dir, run.output_dir)
        assert "round_robin_gradients orders the shards" in run.finish(expect=2)
    run = continued(whole, make_run("as it was", zero=in_turns, **settings(2, 2)))
    assert run.curve() == whole.curve()


def test_stage_0_takes_other_ranks_but_no_other_stage(make_run, finished_run) -> None:
    whole = finished_run(**settings(0, 1))
    run = continued(whole, make_run("other", **settings(0, 2)))
    assert "continues from step-00000004" in run.output
    assert relative_gap(whole.curve(), run.curve()) < FP32
    refused = make_run("refused", **settings(2, 1))
    shutil.copytree(whole.output_dir, refused.output_dir)
    text = refused.finish(expect=2)
    assert (
        "written under ZeRO-0 and this start has ZeRO-2; stages 1, 2 and 3 can follow each other, 0 only itself" in text
    )
    assert refused.run_dir.complete_tags()[-1] == step_tag(2 * K), "nothing was touched"
