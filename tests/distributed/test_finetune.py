"""Fine-tuning as a user starts it: resume, ranks, grids, teachers, spans, predictions; and many in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many_fine_tunings
import pytest
import torch
from compare import assert_same_bits
from glue_sample import write_glue_sample
from huggingface_hub import ModelCard
from launching import ROOT, Launcher, Run, finished, kill_session, start, write_ds_config
from odd_name import ODD_NAME
from safetensors.torch import load_file
from sentence_folder import surround
from squad_sample import write_squad_sample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import TinyWorld
from transformers import AutoTokenizer, pipeline

from engine.config.finetune import FinetuneConfig
from engine.config.reading import parse_config
from engine.errors import UserError
from engine.jobs.finetune.plan import make_finetune_plan
from engine.jobs.finetune.unit import look_back
from engine.ranks.runtime import Runtime
from engine.records.records import read_records
from engine.records.run_dir import RunDir

pytestmark = pytest.mark.launcher

MakeJob = Callable[..., Run]


@pytest.fixture
def make_job(tiny_world: TinyWorld, tmp_path: Path) -> MakeJob:
    """make_job(name, *argv, ranks=…, launcher=…): fine-tunes the tiny teacher on the GLUE sample, fp32."""
    write_glue_sample(tmp_path / "glue")

    def make(name: str, *argv: str, ranks: int = 1, launcher: Launcher = "forked", stage: int = 1) -> Run:
        usual = {
            "model.path": tiny_world.teacher,
            "task.data_dir": tmp_path / "glue",
            "task.name": "RTE",
            "task.epochs": 2,
            "task.batch": 8,
            "task.lr": 3e-3,
            "train.log_every": 1,
            "deepspeed_config": write_ds_config(
                tmp_path / f"ds {stage}", zero_optimization={"stage": stage}, csv_monitor={"enabled": True}
            ),
        }
        given = set(argv[::2])
        words = [word for key, value in usual.items() if f"--{key}" not in given for word in (f"--{key}", str(value))]
        return Run(tmp_path / name, ranks=ranks, argv=[*words, *argv], launcher=launcher, script="finetune.py")

    return make


def result_of(run: Run) -> dict[str, Any]:
    return run.records("result")[-1]


def unit_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "records.jsonl") if record["kind"] == kind]


def without_speed(result: dict[str, Any]) -> dict[str, Any]:
    tasks = {name: {k: v for k, v in task.items() if k != "samples_per_s"} for name, task in result["tasks"].items()}
    return {"tasks": tasks, "averages": result["averages"]}


def weights(run: Run, unit: str) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / unit / "model" / "model.safetensors")


def test_stopped_and_continued_equals_uninterrupted(make_job: MakeJob) -> None:
    """2 ranks, two tasks; a signal to one rank in the second one. Same scores and weights, bit for bit."""
    argv = ("--task.name", "RTE,STS-B", "--task.epochs", "40", "--train.log_every", "20", "--task.eval_every", "60")
    whole, half = (make_job(name, *argv, ranks=2) for name in ("whole", "half"))
    whole.finish()
    process = half.start()
    try:
        second = RunDir(half.output_dir / "STS-B" / "seed-0")
        while not (second.records.is_file() and unit_records(second.root, "step")):
            assert process.poll() is None, process.stdout.read()
        os.kill(half.rank_pids(process.pid)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
    finally:
        kill_session(process)
    assert process.returncode == 4, output[-3000:]
    assert len(second.complete_tags()) == 1
    assert half.records("run")[-1]["status"] == "preempted"
    assert not half.records("result")
    first_before = (half.output_dir / "RTE" / "seed-0" / "records.jsonl").read_bytes()
    output = half.finish()
    assert "2 fine-tunings, 1 of them already finished; seed" in output
    assert "continues STS-B, seed 0 from step-" in output
    assert (half.output_dir / "RTE" / "seed-0" / "records.jsonl").read_bytes() == first_before  # not run again
    assert without_speed(result_of(half)) == without_speed(result_of(whole))
    for unit in ("RTE/seed-0", "STS-B/seed-0"):
        assert_same_bits(weights(half, unit), weights(whole, unit))
        assert not (half.output_dir / unit / "checkpoints").exists()
        rows = (half.output_dir / unit / "csv" / "loss_total.csv").read_text().splitlines()[1:]
        steps = [record for record in unit_records(half.output_dir / unit, "step") if "total" in record]
        assert rows == [f"{record['step']},{record['total']}" for record in steps]


def test_ranks_agree(make_job: MakeJob) -> None:
    """Two ranks train and score what one does, to the rounding of sums, in a folder of any name. Dropout differs by
    rank, so it is off."""
    argv = ("--task.name", "STS-B,MNLI", "--task.dropout", "0")
    one, two = make_job("one", *argv), make_job(ODD_NAME, *argv, ranks=2, launcher="real")
    one.finish()
    two.finish()
    for name in ("STS-B", "MNLI"):
        folders = [run.output_dir / name / "seed-0" for run in (one, two)]
        losses = [[r["total"] for r in unit_records(f, "step") if "total" in r] for f in folders]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        metrics = [unit_records(f, "result")[0]["metrics"] for f in folders]
        assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)
    assert metrics[0].keys() == {"accuracy_matched", "accuracy_mismatched"}
    assert not (ROOT / "X").exists(), "a shell has read the folder's name"


def test_grid_seeds_and_predictions(make_job: MakeJob, tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Of a sentence encoder, which makes a classifier."""
    folder = tmp_path / "sentences" / "teacher"
    shutil.copytree(tiny_world.teacher, folder / "0_Transformer")
    surround(folder, encoder="0_Transformer")
    argv = ["--task.name", "RTE", "--task.grid", "{lr: [1e-7, 5e-3], batch: [8]}", "--task.seeds", "[0, 3]"]
    run = make_job("grid", *argv, "--task.batch", "8", "--task.lr", "1", "--model.path", str(folder))
    run.argv = [w for i, w in enumerate(run.argv) if not {"--task.batch", "--task.lr"} & {w, run.argv[i - 1]}]
    output = run.finish("--task.predict", "--task.epochs", "20")
    task = result_of(run)["tasks"]["RTE"]
    assert [point["lr"] for point in task["grid"]] == [1e-7, 5e-3]
    best = max(task["grid"], key=lambda point: point["score"])
    assert task["chosen"] == {"lr": best["lr"], "batch": 8.0}
    assert task["score"] == best["score"]
    assert task["seeds"].keys() == {"0", "3"}
    assert task["score_std"] is not None
    models = sorted(path.parent.parent.name for path in run.output_dir.glob("RTE/lr*/seed-*/model"))
    assert models == [f"lr{best['lr']:g}-batch8"] * 2  # losers are removed
    # the exported model gives the predictions that were written, and the score that was reported
    model = run.output_dir / "RTE" / "model"
    classify = pipeline("text-classification", model=str(model), tokenizer=AutoTokenizer.from_pretrained(model))
    lines = (run.output_dir / "predictions" / "dev" / "RTE.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in (run.output_dir.parent / "glue" / "RTE" / "dev.tsv").read_text().splitlines()]
    named = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    got = [found["label"] for found in classify([{"text": r["sentence1"], "text_pair": r["sentence2"]} for r in named])]
    assert got == [line.split("\t")[1] for line in lines]
    accuracy = sum(a == row["label"] for a, row in zip(got, named, strict=True)) / len(named)
    assert accuracy == pytest.approx(task["seeds"]["0"])
    assert len((run.output_dir / "predictions" / "RTE.tsv").read_text().splitlines()) == 1 + 4
    assert "best of the grid" in output
    card = (model / "README.md").read_text()
    assert f"| dev score | {task['seeds']['0']:.4f} |" in card
    assert "| labels | " in card, "the loss"
    data = ModelCard.load(model / "README.md").data
    assert (data.pipeline_tag, data.base_model, data.get("license")) == ("text-classification", "teacher", None)
    assert data.library_name == "transformers"
    assert not (model / "modules.json").exists()
    assert 'tokenizer("One text.", "And another one.", ' in card
    events = EventAccumulator(str(run.output_dir))
    events.Reload()
    assert events.Scalars("score/RTE")[0].value == pytest.approx(task["score"])
    unit = EventAccumulator(str(model.resolve().parent))
    unit.Reload()
    assert {"score/accuracy", "score/score", "loss/labels", "result/score"} <= set(unit.Tags()["scalars"])


def test_changed_settings_and_resume_never_are_refused(make_job: MakeJob) -> None:
    run = make_job("run", "--task.epochs", "1")
    run.finish()
    before = (run.output_dir / "RTE" / "seed-0" / "records.jsonl").read_bytes()
    for words, says in ((["--task.lr", "1e-3"], "task.lr: 0.003 -> 0.001"), (["--resume", "never"], "resume='never'")):
        argv = ["--output_dir", str(run.output_dir), *run.argv, *words]
        plan = make_finetune_plan(parse_config(FinetuneConfig, argv, "test"))
        with pytest.raises(UserError) as error:
            look_back(plan, plan.units[0], Runtime(0, 1, 0, 1, torch.device("cpu"), 1))
        assert says in str(error.value)
    run.finish("--task.seeds", "[0, 1]", "--train.log_every", "7")  # one more seed: the first is kept
    assert (run.output_dir / "RTE" / "seed-0" / "records.jsonl").read_bytes() == before
    assert result_of(run)["tasks"]["RTE"]["seeds"].keys() == {"0", "1"}


def test_a_diverged_task_leaves_the_others_alone(make_job: MakeJob, tmp_path: Path) -> None:
    """A custom regression whose targets overflow fp32 squares; the custom classification beside it is scored."""
    (tmp_path / "good.tsv").write_text("text\tlabel\n" + "the small model\tyes\nnot much else\tno\n" * 12)
    (tmp_path / "bad.tsv").write_text("text\tlabel\n" + "the small model\t1e30\nnot much else\t-1e30\n" * 12)
    custom = {
        name: {"train": str(tmp_path / f"{name}.tsv"), "dev": str(tmp_path / f"{name}.tsv"), "kind": kind}
        for name, kind in (("bad", "regression"), ("good", "classification"))
    }
    run = make_job("run", "--task.name", "bad,good", "--task.custom", json.dumps(custom), "--task.epochs", "20")
    output = run.finish(expect=3)
    result = result_of(run)
    assert result["status"] == "diverged"
    assert result["tasks"]["bad"] is None
    assert result["tasks"]["good"]["score"] == 1.0
    assert unit_records(run.output_dir / "bad" / "seed-0", "error")[0]["status"] == "diverged"
    assert unit_records(run.output_dir / "bad" / "seed-0", "result")[0]["score"] is None
    assert "every fine-tuning diverged" in output
    assert (run.output_dir / "good" / "model" / "config.json").is_file()
    assert not (run.output_dir / "bad" / "seed-0" / "model").exists()


def test_teacher_patience_and_export(make_job: MakeJob) -> None:
    """A fine-tuned teacher, by pattern, teaches logits and hidden states; early stopping keeps the best weights."""
    teacher = make_job("teacher", "--task.name", "RTE,SST-2", "--task.epochs", "10")
    teacher.finish()
    pattern = str(teacher.output_dir / "{task}" / "model")
    run = make_job(
        "run", "--task.name", "RTE,SST-2", "--teacher.path", pattern, "--loss.hidden", "1",
        "--mapping.hidden", "0-2-0-4", "--loss.temperature", "2", "--task.epochs", "30",
        "--task.patience", "2", "--task.eval_every", "2", "--task.predict", "true",
    )  # fmt: skip
    output = run.finish()
    assert f"{teacher.output_dir}/RTE/model: bert" in output
    for name in ("RTE", "SST-2"):
        assert (
            f"teacher of {name}: dev score {100 * result_of(teacher)['tasks'][name]['score']:.2f} (a constant answer"
            in output
        )
    for name in ("RTE", "SST-2"):
        folder = run.output_dir / name / "seed-0"
        steps = unit_records(folder, "step")
        terms = next(record["terms"] for record in steps if "terms" in record)
        assert terms.keys() == {"labels", "logits", "hidden/2-2", "hidden/4-4"}
        scores = {record["step"]: record["scores"]["score"] for record in steps if "scores" in record}
        found = unit_records(folder, "result")[0]
        assert found["score"] == max(scores.values())
        assert found["step"] == next(step for step, score in scores.items() if score == found["score"])
        assert found["steps_run"] == found["step"] + 4 < 90  # two evaluations without a better score
        assert (folder / "model" / "projections.safetensors").is_file()
    labels = [line.split("\t")[1] for line in (run.output_dir / "predictions/dev/RTE.tsv").read_text().splitlines()[1:]]
    rows = (run.output_dir.parent / "glue" / "RTE" / "dev.tsv").read_text().splitlines()[1:]
    right = sum(row.endswith(f"\t{label}") for row, label in zip(rows, labels, strict=True))
    assert right / len(rows) == pytest.approx(result_of(run)["tasks"]["RTE"]["score"])  # of the best weights


@pytest.mark.faults
def test_a_hang_while_predictions_are_written_leaves_stacks(make_job: MakeJob, tmp_path: Path) -> None:
    """The file of the predictions is a pipe that nobody reads. A user cannot set the limit, which is 600 s."""
    run = make_job("hangs", "--task.epochs", "1", "--task.predict", "true")
    (run.output_dir / "predictions" / "dev").mkdir(parents=True)
    os.mkfifo(run.output_dir / "predictions" / "dev" / "RTE.tsv")
    script = tmp_path / "hangs.py"
    script.write_text(
        "from engine.cli import finetune_main\nfrom engine.config.distill import TrainConfig\n"
        "from engine.ranks.exit import run_rank\nTrainConfig.hang_timeout_s = 5.0\nrun_rank(finetune_main)\n"
    )
    output = finished(start([str(script), "--output_dir", str(run.output_dir), *run.argv]), 1)
    assert "has finished nothing for 5 s" in output
    unit = run.output_dir / "RTE" / "seed-0"
    (stacks,) = (unit / "hangs").iterdir()
    assert stacks.name.startswith("predictions-")
    assert "write_submission" in stacks.read_text()
    (error,) = unit_records(unit, "error")
    assert (error["status"], error["rank"], error["stacks"]) == ("hang", 0, str(stacks))


def test_squad_from_windows_to_answers(make_job: MakeJob, tmp_path: Path) -> None:
    write_squad_sample(tmp_path / "squad" / "SQuAD", v2=True)
    run = make_job(
        "run", "--task.name", "SQuAD-v2", "--task.data_dir", str(tmp_path / "squad"), "--task.seq_len", "48",
        "--task.doc_stride", "16", "--task.epochs", "1", "--task.predict", "true",
    )  # fmt: skip
    run.finish()
    task = result_of(run)["tasks"]["SQuAD-v2"]
    assert task["metrics"].keys() == {"exact_match", "f1"}
    assert task["score"] == task["metrics"]["f1"]["mean"]
    answers = json.loads((run.output_dir / "predictions" / "dev" / "SQuAD-v2.json").read_text())
    assert len(answers) == 24


def test_dry_run_writes_nothing(make_job: MakeJob) -> None:
    run = make_job("run", "--task.name", "glue", "--dry_run", "true")
    output = run.finish()
    assert "MNLI: 24 training rows, 8 + 8 dev rows; 3 labels; score: accuracy" in output
    assert "9 fine-tunings" in output
    assert not run.output_dir.exists()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_many_fine_tunings_in_one_process(tmp_path: Path, tiny_world: TinyWorld, stage: int) -> None:
    """The same fine-tuning first and third in a process: the same bits; and no module stays behind."""
    write_glue_sample(tmp_path / "glue")
    ds_config = write_ds_config(tmp_path / "ds", zero_optimization={"stage": stage})
    words = [str(tmp_path / "glue"), str(tiny_world.teacher), str(ds_config), "2 0 2"]
    output = finished(start([many_fine_tunings.__file__, *words]), 0)
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"results"')))
    alone, other, third = found["results"]
    assert third == alone != other
    assert found["modules_left"] == 0
