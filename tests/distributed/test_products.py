"""What a run leaves: export, TensorBoard, banner; and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from in_process import only_error, refuse, refuse_run
from launching import ROOT, Run, environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import TinyWorld
from transformers import AutoModel, AutoTokenizer

from engine.cli import parse_config
from engine.config.deepspeed import FOLDER
from engine.config.distill import RunConfig
from engine.data.batch import Counts
from engine.data.loader import CorpusLoader
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import make_plan
from engine.models.capture import install
from engine.models.projections import Projections
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import has_fp16

pytestmark = pytest.mark.launcher


def held_out_terms(run: Run, world: TinyWorld) -> dict[str, float]:
    """The held-out losses, computed here from the exported folder alone: no DeepSpeed, one process, one batch size."""
    plan = make_plan(parse_config(RunConfig, ["--output_dir", str(run.output_dir), *run.argv], "test"))
    student = AutoModel.from_pretrained(run.run_dir.student, add_pooling_layer=False)
    install(student, "eager")
    projections = Projections(plan.config.loss, student_width=16, teacher_width=32, layers=plan.losses.projected_layers)
    projections.load_state_dict(run.projections())
    teacher = FrozenTeacher.load(
        str(world.teacher),
        wanted=plan.losses.wanted_teacher,
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend="eager",
    )
    loader = CorpusLoader(
        world.corpus,
        tokenizer=plan.tokenizer,
        eval_sequences=20,
        seed=0,
        global_batch=8,
        micro_batch=8,
    )
    module = DistilModule(student.eval(), projections, plan.losses)
    batches = list(loader.evaluation(5))
    counts = sum((batch.counts for batch in batches), Counts())
    with torch.no_grad():
        terms = sum(module(batch, teacher(batch), counts)[1] for batch in batches)
    names = plan.losses.term_names
    return dict(zip(names, terms.tolist()[: len(names)], strict=True))


@pytest.mark.parametrize(("stage", "precision", "tolerance"), [(1, "fp32", 1e-5), (3, "fp32", 1e-5), (0, "bf16", 3e-2)])
def test_the_export_gives_the_training_modules_outputs(
    make_run, tiny_world: TinyWorld, stage: int, precision: str, tolerance: float
) -> None:
    run = make_run("run", stage=stage, precision=precision, ranks=2, train__eval_every=3)
    run.finish()
    during = run.records("result")[-1]["held_out"]
    assert during["step"] == 6
    after = held_out_terms(run, tiny_world)
    assert set(after) == set(during["terms"])
    assert len(after) == 5  # two hidden pairs, two attention pairs, the embeddings
    for name, value in after.items():
        assert value == pytest.approx(during["terms"][name], rel=tolerance), name


def test_export_script_needs_neither_ranks_nor_teacher(make_run, tmp_path: Path) -> None:
    run = make_run("run", stage=3, ranks=2, loss__mlm=1.0, data__mlm_probability=0.2, train__save_every=3)
    run.finish()
    target = tmp_path / "exported here"
    done = subprocess.run(
        [
            sys.executable,
            "launch/export.py",
            "--run",
            str(run.output_dir),
            "--to",
            str(target),
            "--tag",
            "step-00000003",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModel.from_pretrained(target)
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        hidden = model(**tokenizer("one small model", return_tensors="pt")).last_hidden_state
    assert torch.isfinite(hidden).all()
    card = (target / "README.md").read_text()
    for fact in (
        "| optimizer step | 3 |",
        "| hidden-state mapping | 2-4 |",
        str(run.argv[run.argv.index("--teacher.path") + 1]),
    ):
        assert fact in card
    assert not list(target.glob("*.bin"))
    names = model.state_dict().keys()
    assert not [name for name in names if "projection" in name]


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "no complete checkpoint" in refuse("export", "--run", tmp_path)
    assert "run" in refuse("export", "--to", "x").removeprefix("error: ")


def test_tensorboard_has_every_promised_number_by_optimizer_step(make_run) -> None:
    scaled = has_fp16()
    run = make_run("run", ranks=2, precision="fp16" if scaled else "bf16", train__eval_every=3, micro=2)
    run.finish()
    events = EventAccumulator(str(run.run_dir.tensorboard), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    promised = {
        "loss/total", "loss/hidden", "loss/attention", "loss/embedding",
        "pair/hidden/1-2", "pair/hidden/2-4", "pair/attention/1-2", "pair/attention/2-4", "pair/embedding",
        "share/hidden", "share/attention", "share/embedding",
        "optimizer/lr", "optimizer/grad_norm", "optimizer/skipped_steps",
        "speed/tokens_per_s", "speed/samples_per_s", "speed/tflops", "speed/data_wait_share",
        "time_share/teacher", "time_share/student", "time_share/optimizer",
        "memory/peak_gib", "loss_held_out/total", "loss_held_out/hidden/1-2",
    }  # fmt: skip
    assert promised <= tags, promised - tags
    assert ("optimizer/loss_scale" in tags) == scaled
    assert [e.step for e in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("loss_held_out/total")] == [3, 6]
    shares = [events.Scalars(f"share/{name}")[0].value for name in ("hidden", "attention", "embedding")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert "config/text_summary" in events.Tags()["tensors"]
    assert len(list(run.run_dir.tensorboard.glob("events*"))) == 1, "one writer"


def test_dry_run_prints_the_banner_and_writes_nothing(make_run) -> None:
    run = make_run("run", launcher=False, mapping__hidden="0-3", mapping__attention="4-0")
    output = run.finish("--dry_run")
    assert "student layer      1  2" in output
    assert "teacher hidden     ·  3" in output
    assert "teacher attention  4  ·" in output
    assert "8 sequences = 8 micro batch x 1 accumulation x 1 ranks" in output
    assert "torch fused AdamW" in output
    assert "GiB per rank" in output
    assert not run.output_dir.exists()


MISTAKES = [
    (["--teacher.path", "/nowhere"], "teacher.path='/nowhere'"),
    (["--data.path", "/nowhere"], "launch/prepare_data.py"),
    (["--data.seq_len", "32"], "prepared with 16"),
    (["--mapping.hidden", "1-9"], "teacher layer 9"),
    (["--student.heads", "2"], "2"),
    (["--student.hidden_size", "18"], "divide"),
    (["--loss.mlm", "1"], "data.mlm_probability"),
    (["--mapping.hidden", "none", "--loss.embedding", "0"], "mapping"),
    (["--train.global_batch", "7", "--deepspeed_config", "/nowhere.json"], "/nowhere.json"),
    (["--student.init", "1-2-3"], "init"),
    (["--student.fused_layer_norm", "true"], "apex"),
    (["--optim.name", "apex_fused_adam"], "apex"),
    (["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
    (["--data.eval_sequences", "5000"], "hold out at most"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_exit_2_with_one_line(make_run, argv: list[str], says: str) -> None:
    assert says in refuse_run(make_run("run"), *argv)


def test_a_processor_without_fp16_exits_2_with_one_line(make_run, monkeypatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # so that one with fp16 does as one without
    said = only_error(make_run("run", precision="fp16", launcher=False).finish(expect=2))
    assert "fp16 on a CPU needs AVX-512 FP16" in said
    assert "ds_configs/zero0_bf16.json" in said


@pytest.mark.parametrize(
    "argv", [["--loss.hiden", "3"], ["--output_dir", "/proc/nowhere"], ["--data.eval_sequences", "5000"]]
)
def test_the_launcher_shows_a_mistake_once(make_run, argv: list[str]) -> None:
    run = make_run("run", ranks=2)
    began = time.monotonic()
    output = run.finish(*argv, expect=2)
    assert len([line for line in output.splitlines() if "error: " in line]) == 1, output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60
    assert not run.run_dir.config.exists()


def test_require_fused_makes_a_fall_back_an_error(make_run) -> None:
    run = make_run("run", launcher=False, stage=0, optim__name="lamb")
    assert "require_fused=true, but DeepSpeed FusedLamb needs CUDA" in run.finish("--require_fused", expect=2)


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"{stage}_fp16", marks=pytest.mark.fp16)
            for stage in ("zero0", "zero2", "zero3", "zero3_offload")
        ),
        "zero0_bf16",
        "zero0_fp32",
    ],
)
def test_shipped_ds_configs_train(make_run, name: str) -> None:
    run = make_run("run", launcher=False, deepspeed_config=FOLDER / f"{name}.json", train__steps=3, train__lr=1e-4)
    run.finish()
    assert [r["step"] for r in run.steps()] == [1, 2, 3]


def test_settings_without_effect_are_warnings(make_run) -> None:
    run = make_run("run", launcher=False)
    output = run.finish(
        "--dry_run", "--data.whole_word_mask", "true", "--loss.temperature", "2", "--mapping.hidden", "2-0"
    )
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3, warnings
    assert "data.whole_word_mask" in warnings[0] + warnings[1] + warnings[2]


def test_other_encoders_and_losses_run_end_to_end(make_run) -> None:
    """Relation KL with other head counts, probabilities KL, cosine, logits KL and MLM together, once."""
    run = make_run(
        "run",
        ranks=2,
        student__heads=2,
        loss__attention=0,
        loss__relation=1.0,
        loss__relation_heads=8,
        loss__cosine=1.0,
        loss__logits=1.0,
        loss__mlm=0.5,
        data__mlm_probability=0.2,
        loss__temperature=2.0,
        train__steps=8,
    )
    run.finish()
    first, last = run.steps()[0], run.steps()[-1]
    assert set(first["losses"]) == {"hidden", "embedding", "relation", "cosine", "logits", "mlm"}
    assert last["total"] < first["total"]
    assert json.loads((run.run_dir.student / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
