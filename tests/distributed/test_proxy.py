"""The proxy job as the search will start it: real processes, tiny models, tiny GLUE tasks."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from in_process import refuse_run
from launching import ROOT, Launcher, Run, kill_session, write_ds_config
from odd_name import ODD_NAME
from safetensors.torch import load_file
from searching import YARDSTICK
from tiny_world import TinyWorld

from engine.records.records import parse_record
from engine.records.run_dir import COMPLETE, tag_step
from ga.jobs.outcome import Outcome, read_job

MakeProxy = Callable[..., Run]


def proxies(world: TinyWorld, glue: Path, folder: Path) -> MakeProxy:
    """make_proxy(name, genomes, ranks=…, launcher=…, **settings), in that folder: 4 x 32 -> 2 x 16, six steps, fp32."""

    def make(name: str, *genomes: str, ranks: int = 1, launcher: Launcher = "forked", **settings: object) -> Run:
        values: dict[str, object] = {
            "deepspeed_config": write_ds_config(folder / f"ds {name}", zero_optimization={"stage": 0}),
            "teacher.path": world.teacher,
            "student.layers": 2,
            "student.hidden_size": 16,
            "student.dropout": 0.1,
            "data.path": world.corpus,
            "task.data_dir": glue,
            "train.global_batch": 8,
            "train.warmup_steps": 2,
            "train.log_every": 2,
            "proxy.steps": 6,
            "proxy.keep_students": True,
            "proxy.yardstick": YARDSTICK,
        }
        values.update({key.replace("__", "."): value for key, value in settings.items()})
        argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        return Run(
            folder / name, ranks=ranks, argv=["--genomes", *genomes, *argv], launcher=launcher, script="proxy.py"
        )

    return make


@pytest.fixture
def make_proxy(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> MakeProxy:
    return proxies(tiny_world, glue, tmp_path)


@pytest.fixture(scope="module")
def cohort(tiny_world: TinyWorld, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four genomes with two seeds each, finished. Tests only look at it."""
    make = proxies(tiny_world, glue, tmp_path_factory.mktemp("finished"))
    run = make("cohort", "2-4", "0-3", "none", "1-0/0-2", proxy__report_at=[2, 4], proxy__repeats=2)
    run.finish()
    return run


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "students" / name / "model.safetensors")


def layer_table_of(run: Run) -> list[list[float]]:
    (result,) = run.records("result")
    table: list[list[float]] = result["layers"]
    return table


def results(run: Run) -> dict[tuple[str, int], dict[str, Any]]:
    return {(r["genome"], r["seed"]): r for r in run.records("result")}


def test_a_member_of_a_cohort_equals_the_same_genome_alone(make_proxy: MakeProxy, cohort: Run) -> None:
    """A layer table changes nothing of it, and is the same."""
    alone = make_proxy("alone", "0-3", seed=1, proxy__report_at=[2, 4], proxy__layer_table=True)
    said = alone.finish()
    both = results(cohort)
    assert set(both) == {(g, s) for g in ("2-4", "0-3", "0-0", "1-0/0-2") for s in (0, 1)}
    mine, theirs = both["0-3", 1], results(alone)["0-3", 1]
    for key in ("fitness", "scores", "metrics", "losses", "total", "reports", "fingerprint"):
        assert mine[key] == theirs[key], key
    assert set(mine["reports"]) == {"2", "4"}
    one, other = weights(cohort, "0-3-seed1"), weights(alone, "0-3-seed1")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(*(weights(cohort, f"0-3-seed{s}")["embeddings.word_embeddings.weight"] for s in (0, 1)))
    assert "layers" not in mine
    assert [len(row) for row in layer_table_of(alone)] == [5, 5, 5]
    assert said.count("student\\teacher") == 2, "before training, and after"
    assert re.search(r"^0-3  seed 1  after 6 steps\n.+\nemb +-?\d?\.\d\d\*.*\n1( +-?\d?\.\d\d){5}\n2.+\*", said, re.M)
    assert mine["cohort"] == 4
    assert theirs["cohort"] == 1
    assert mine["mapping"] == {"hidden": "0-3", "attention": "0-3"}
    assert mine["fitness"] == pytest.approx((sum(mine["scores"].values()) / 3 - 0.4) / 0.55)
    assert set(mine["scores"]) == {"SST-2", "MRPC", "STS-B"}
    assert {"start", "encode", "load", "train", "evaluate", "teacher", "student", "optimizer"} <= set(mine["wall_s"])
    assert "signal ratio" in cohort.output
    finished = cohort.records("run")[-1]["wall_s"]
    assert mine["wall_s"]["train"] == pytest.approx(finished["train"] - both["0-3", 0]["wall_s"]["train"])
    assert cohort.records("run")[-1]["signal"]["seeds"] == 2


def test_students_of_one_cohort_may_start_from_other_layers(make_proxy: MakeProxy) -> None:
    """Each is the student whose student.init says the same."""
    settings: dict[str, object] = {"loss__embedding": 0, "proxy__layer_table": True}
    run = make_proxy("kept", "2-4", "1-3@2-4", "3-0@none", **settings)
    said = run.finish()
    alone = make_proxy("alone", "2-4", student__init="1-3", **settings)
    alone.finish()
    mine, theirs, plain = results(run)["1-3@2-4", 0], results(alone)["2-4", 0], results(run)["2-4", 0]
    for key in ("fitness", "scores", "losses", "total", "layers"):
        assert mine[key] == theirs[key], key
        assert mine[key] != plain[key], key
    one, other = weights(run, "1-3@2-4-seed0"), weights(alone, "2-4-seed0")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert mine["mapping"] == {"hidden": "2-4", "attention": "2-4", "kept": "1-3"}
    untrained = results(run)["3-0@0-0", 0]
    assert untrained["steps"] == 0
    assert untrained["layers"] != plain["layers"]
    assert "1-3@2-4 before training" in said


def test_teacher_start_and_none_are_in_every_proxy_that_has_no_yardstick(make_proxy: MakeProxy) -> None:
    """Without the embedding loss, `none` is the untrained student; a student that is copied whole is the teacher."""
    run = make_proxy("measured", "2-4", proxy__yardstick="{}", proxy__other_tasks="[CoLA]", loss__embedding=0)
    output = run.finish()
    (baselines,) = [record for record in run.records("run") if record["status"] == "baselines"]
    found = results(run)
    assert set(found) == {("2-4", 0), ("0-0", 0)}
    assert found["0-0", 0]["scores"] == baselines["start"]
    assert set(baselines["teacher"]) == {"SST-2", "MRPC", "STS-B", "CoLA"}
    counting = [task for task in ("SST-2", "MRPC", "STS-B") if baselines["teacher"][task] > baselines["start"][task]]
    assert counting, "this teacher is better at nothing: take another"
    for result in found.values():
        assert {task for task, one in result["yardstick"].items() if one["weight"]} == set(counting)
        start, teacher = baselines["start"], baselines["teacher"]
        shares = [(result["scores"][task] - start[task]) / (teacher[task] - start[task]) for task in counting]
        assert result["fitness"] == pytest.approx(sum(shares) / len(shares))
    table = output[output.rindex("genome  ") :]
    assert [line.split()[0] for line in table.splitlines()[1:5]] in (
        ["2-4", "0-0", "start", "teacher"], ["0-0", "2-4", "start", "teacher"],
    )  # fmt: skip
    assert "(CoLA)" in table
    again = run.finish()
    assert "2 of 2 results exist already" in again
    assert again[again.rindex("genome  ") :] == table
    same = make_proxy(
        "same", "none", proxy__yardstick="{}", student__layers=4, student__hidden_size=32, loss__embedding=0,
        student__init="uniform", proxy__keep_students=False,
    )  # fmt: skip
    same.finish()
    (whole,) = [record for record in same.records("run") if record["status"] == "baselines"]
    assert whole["start"] == whole["teacher"]
    assert {task: whole["teacher"][task] for task in whole["teacher"]} == {
        task: score for task, score in baselines["teacher"].items() if task != "CoLA"
    }


def test_a_yardstick_that_is_given_makes_other_fitness_of_the_same_scores(cohort: Run, tmp_path: Path) -> None:
    run = cohort.copied(tmp_path / "again")
    before = results(run)
    idle = "{start: 0, teacher: 1, weight: 0}"
    other = f"{{SST-2: {{start: 0.1, teacher: 0.9}}, MRPC: {idle}, STS-B: {idle}}}"
    output = run.finish("--proxy.yardstick", other)
    assert "8 of 8 results exist already" in output
    line = next(line for line in output.splitlines() if line.startswith("0-3 "))
    mean = sum(before["0-3", seed]["scores"]["SST-2"] for seed in (0, 1)) / 2
    assert f"{(mean - 0.1) / 0.8:.4f}" in line


def test_the_same_command_finds_everything_done(cohort: Run, tmp_path: Path) -> None:
    """Other steps make another fingerprint."""
    run = cohort.copied(tmp_path / "again")
    before = run.run_dir.records.read_text()
    again = run.finish()
    assert "8 of 8 results exist already" in again
    new = run.run_dir.records.read_text().removeprefix(before)
    assert [json.loads(line)["kind"] for line in new.splitlines()] == ["run", "run"]
    dry = run.finish("--train.lr", "2e-3", "--dry_run")
    assert "results exist already" not in dry
    assert "results exist already" not in run.finish("--proxy.layer_table", "true", "--dry_run"), "they have no tables"


def test_a_member_that_diverges_ends_alone(make_proxy: MakeProxy) -> None:
    """An absurd loss weight overflows the one member that has an attention loss; the other's scores stay."""
    run = make_proxy("apart", "2-4/0-0", "2-4", loss__attention=3e38, train__log_every=1)
    output = run.finish()
    found = results(run)
    assert set(found) == {("2-4/0-0", 0)}
    assert math.isfinite(found["2-4/0-0", 0]["fitness"])
    errors = run.records("error")
    assert [e["genome"] for e in errors] == ["2-4"]
    assert errors[0]["status"] == "diverged"
    assert "2-4  seed 0: diverged" in output
    said = [record for line in output.splitlines() if (record := parse_record(line)) and record["kind"] == "error"]
    assert [(r["genome"], r["status"]) for r in said] == [("2-4", "diverged")]
    all_of_them = make_proxy("lost", "2-4", loss__attention=3e38, train__log_every=1)
    assert "diverged" in all_of_them.finish(expect=3)
    beside = make_proxy("beside none", "2-4", loss__attention=3e38, train__log_every=1, proxy__yardstick="{}")
    beside.finish(expect=3)
    assert set(results(beside)) == {("0-0", 0)}, "none was not asked for"
    assert not all_of_them.records("result")


def test_the_fine_tuning_evaluator_scores_copies(make_proxy: MakeProxy) -> None:
    """A score in between does not disturb the student that goes on, and the same seed gives the same scores."""
    settings: dict[str, object] = {
        "proxy__evaluator": "finetune", "proxy__tasks": "[SST-2, STS-B]", "proxy__batch": 8, "proxy__lr": 3e-3,
        "proxy__epochs": 4, "proxy__keep_students": False, "proxy__yardstick": "{}",
    }  # fmt: skip
    run = make_proxy("scored", "2-4", "none", proxy__report_at=[3], loss__embedding=0, **settings)
    run.finish()
    found = results(run)
    assert found["0-0", 0]["steps"] == 0, "nothing to learn from: scored as it was initialised"
    assert set(found["2-4", 0]["metrics"]["STS-B"]) == {"pearson", "spearman"}
    plain = make_proxy("plain", "2-4", loss__embedding=0, **settings)
    plain.finish()
    assert results(plain)["2-4", 0]["scores"] == found["2-4", 0]["scores"]
    assert results(plain)["2-4", 0]["total"] == found["2-4", 0]["total"]
    assert not (run.output_dir / "students").exists() or not list((run.output_dir / "students").iterdir())


@pytest.mark.launcher
def test_two_ranks_through_the_launcher(make_proxy: MakeProxy) -> None:
    """Another number of ranks changes rounding only, only rank 0 speaks, no shared memory stays behind, and the folder
    may have any name."""
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    settings: dict[str, object] = {"student__dropout": 0.0, "proxy__layer_table": True}
    two = make_proxy(ODD_NAME, "2-4", "0-3", ranks=2, launcher="real", **settings)
    output = two.finish()
    one = make_proxy("one", "2-4", "0-3", **settings)
    one.finish()
    for key, result in results(one).items():
        twin = results(two)[key]
        assert twin["world_size"] == 2
        assert twin["total"] == pytest.approx(result["total"], rel=1e-5)
        for row, other in zip(twin["layers"], result["layers"], strict=True):
            assert row == pytest.approx(other, abs=2e-3)
        assert twin["scores"]["STS-B"] == pytest.approx(result["scores"]["STS-B"], abs=1e-3)
    assert output.count("fitness 0.") == 2
    assert output.count("student\\teacher") == 3, "before training, and of each student"
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
    assert not (ROOT / "X").exists(), "a shell has read the folder's name"


def test_sharded_models_have_the_layer_tables_of_whole_ones(make_proxy: MakeProxy, tmp_path: Path) -> None:
    """Student under ZeRO-3, teacher sharded too; and a student that nothing trains."""
    settings: dict[str, object] = {
        "student__dropout": 0.0, "loss__embedding": 0, "proxy__layer_table": True, "proxy__keep_students": False,
    }  # fmt: skip
    whole = make_proxy("whole", "2-4", "none", **settings)
    whole.finish()
    file = write_ds_config(tmp_path / "ds sharded", zero_optimization={"stage": 3})
    sharded = make_proxy(
        "sharded", "2-4", "none", ranks=2, deepspeed_config=file, teacher__placement="zero3", **settings
    )
    assert "0-0  seed 0  untrained" in sharded.finish()
    for key, result in results(whole).items():
        for row, other in zip(results(sharded)[key]["layers"], result["layers"], strict=True):
            assert row == pytest.approx(other, abs=1e-3)


def test_a_mistake_ends_with_one_line_and_leaves_nothing(make_proxy: MakeProxy) -> None:
    said = refuse_run(make_proxy("wrong", "2-9"))
    assert said.startswith("error: genomes: mapping 2-9: student layer 2 names teacher layer 9")


def test_a_student_below_the_threshold_ends_early_and_its_cohort_goes_on(make_proxy: MakeProxy, cohort: Run) -> None:
    plain = results(cohort)
    reports = {genome: plain[genome, 0]["reports"] for genome in ("2-4", "0-3")}
    low, high = sorted(reports, key=lambda genome: reports[genome]["4"])
    between = (reports[low]["4"] + reports[high]["4"]) / 2
    assert reports[low]["4"] < between < reports[high]["4"], "these two genomes score alike: take others"
    halved = make_proxy("halved", low, high, proxy__report_at=[2, 4], proxy__stop_below=f"{{4: {between}}}")
    output = halved.finish()
    assert set(results(halved)) == {(high, 0)}
    assert results(halved)[high, 0]["fitness"] == plain[high, 0]["fitness"]
    stopped = [record for record in halved.records("step") if record.get("status") == "stopped"]
    assert [(record["genome"], record["step"], record["reports"]) for record in stopped] == [(low, 4, reports[low])]
    assert not any(r["step"] > 4 and r.get("genome") == low for r in halved.steps())
    assert f"{low}  seed 0: stopped after step 4" in output
    log = halved.output_dir / "output.log"
    log.write_text(output)
    report = read_job(log, None, genomes=[low, high], exit_code=0, timed_out=False)
    assert report.outcomes == {low: Outcome.STOPPED, high: Outcome.OK}
    assert report.stopped == {low: {2: reports[low]["2"], 4: reports[low]["4"]}}


def test_a_dry_run_says_what_a_search_must_know(make_proxy: MakeProxy, cohort: Run) -> None:
    run = make_proxy("planned", "none", proxy__report_at=[2, 4])
    found = [parse_record(line) for line in run.finish("--dry_run").splitlines()]
    planned = [record for record in found if record is not None]
    assert [(r["kind"], r["status"], r["student_layers"], r["teacher_layers"]) for r in planned] == [
        ("run", "planned", 2, 4)
    ]
    assert planned[0]["tasks"] == ["SST-2", "MRPC", "STS-B"]
    assert planned[0]["sequences"] > 100
    assert not run.output_dir.exists()
    assert {r["fingerprint"] for r in cohort.records("result")} == {planned[0]["fingerprint"]}


LADDER = {
    "train__schedule": "warmup_stable_decay",
    "train__decay_share": 0.5,
    "proxy__save_every": 100,
    "proxy__report_at": [1],
}


def test_a_longer_proxy_goes_on_from_before_the_decay_of_a_shorter_one(make_proxy: MakeProxy) -> None:
    """Bit by bit what it computes in one go; a student without a checkpoint begins anew, in a cohort of its own."""
    whole = make_proxy("whole", "2-4", "0-3", proxy__steps=8, **LADDER)
    whole.finish()
    short = make_proxy("ladder", "2-4", "0-3", proxy__steps=4, **LADDER)
    short.finish()
    assert {path.name for path in short.output_dir.glob("cohorts/*/checkpoints/step-*")} == {"step-00000002"}
    shutil.rmtree(short.output_dir / "cohorts" / "0-3-seed0")
    longer = make_proxy("ladder", "2-4", "0-3", proxy__steps=8, **LADDER)
    assert "\n2-4, seed 0: continued after step 2\n" in longer.finish()
    expected = results(whole)
    for key, result in results(longer).items():
        assert result["cohort"] == 1
        for field in ("scores", "metrics", "losses", "total", "reports", "steps", "fingerprint"):
            assert result[field] == expected[key][field], (key, field)
        assert_same_bits(weights(longer, f"{key[0]}-seed0"), weights(whole, f"{key[0]}-seed0"))


def test_a_long_cohort_that_is_stopped_goes_on(make_proxy: MakeProxy) -> None:
    run = make_proxy("stopped", "2-4", "0-3", proxy__steps=5000, train__log_every=1, **LADDER)
    process = run.start()
    try:
        run.wait_for_step(3, process)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        kill_session(process)
    assert process.returncode == 4, output[-3000:]
    (tag,) = {path.name for path in run.output_dir.glob("cohorts/*/checkpoints/step-*") if (path / COMPLETE).is_file()}
    again = run.start()
    try:
        run.wait_for_step(tag_step(tag) + 1, again)
    finally:
        kill_session(again)
    assert f"2-4, 0-3, seed 0: continued after step {tag_step(tag)}" in again.communicate()[0]
    refused = make_proxy("stopped", "2-4", proxy__steps=5000, **{**LADDER, "train__lr": 2e-3})
    assert "train.lr: 0.001 -> 0.002" in refused.finish(expect=2)
