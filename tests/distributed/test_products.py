"""What a run leaves: export, TensorBoard, banner; and what it says of bad input."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from in_process import only_error, refuse, refuse_run, succeed
from launching import Launcher, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tiny_world import TinyWorld
from transformers import AutoModel, AutoTokenizer

from engine.config.deepspeed_file import FOLDER
from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.data.batch import Counts
from engine.data.loader import CorpusLoader
from engine.data.share import StepShare
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import make_plan
from engine.models.install import install
from engine.models.projections import Projections
from engine.models.teacher import FrozenTeacher
from engine.records.comparison import Comparison
from engine.records.run_dir import HELD_OUT, RunDir

pytestmark = pytest.mark.launcher

MakeRun = FinishedRun = Callable[..., Run]
EVALUATED = {"ranks": 2, "train__eval_every": 3}
BF16 = EVALUATED | {"stage": 0, "precision": "bf16", "micro": 2}
OTHER_LOSSES: dict[str, Any] = {
    "ranks": 2,
    "stage": 3,
    "student__heads": 2,
    "loss__attention": 0,
    "loss__relation": 1.0,
    "loss__relation_heads": 8,
    "loss__cosine": 1.0,
    "loss__logits": 1.0,
    "loss__mlm": 0.5,
    "data__mlm_probability": 0.2,
    "loss__temperature": 2.0,
    "train__steps": 8,
    "train__save_every": 3,
    "measure": True,
}


def held_out_terms(run: Run, world: TinyWorld) -> dict[str, float]:
    """The held-out losses, computed here from the exported folder alone: no DeepSpeed, one process, one batch size."""
    plan = make_plan(parse_config(RunConfig, ["--output_dir", str(run.output_dir), *run.argv], "test"))
    student = AutoModel.from_pretrained(run.run_dir.student, add_pooling_layer=False)
    install(student, "eager")
    projections = Projections(plan.config.loss, student_width=16, teacher_width=32, layers=plan.losses.projected_layers)
    projections.load_state_dict(run.projections())
    teacher = FrozenTeacher.load(
        plan.teacher,
        wanted=plan.losses.wanted_teacher,
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend="eager",
    )
    loader = CorpusLoader(
        world.corpus,
        StepShare(8, 8),
        tokenizer=plan.tokenizer,
        eval_sequences=20,
        seed=0,
    )
    scales = run.records("run")[0]["measured"]["scales"]
    module = DistilModule(student.eval(), projections, plan.losses.scaled(scales))
    batches = list(loader.held_out_batches(5))
    counts = sum((batch.counts for batch in batches), Counts())
    with torch.no_grad():
        terms = sum(module(batch, teacher(batch), counts)[1] for batch in batches)
    names = plan.losses.term_names
    return dict(zip(names, terms.tolist()[: len(names)], strict=True))


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [(EVALUATED, 1e-5), (EVALUATED | {"stage": 3}, 1e-5), (BF16, 3e-2)],
    ids=["fp32", "fp32, stage 3", "bf16"],
)
def test_the_export_gives_the_training_modules_outputs(
    finished_run: FinishedRun, tiny_world: TinyWorld, settings: dict[str, Any], tolerance: float
) -> None:
    run = finished_run(**settings)
    during = run.records("result")[-1]["held_out"]
    assert during["step"] == 6
    after = held_out_terms(run, tiny_world)
    assert set(after) == set(during["terms"])
    assert len(after) == 5  # two hidden pairs, two attention pairs, the embeddings
    for term, value in after.items():
        assert value == pytest.approx(during["terms"][term], rel=tolerance), term


def test_export_script_needs_neither_ranks_nor_teacher(
    finished_run: FinishedRun, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    run, target = finished_run(**OTHER_LOSSES), tmp_path / "exported here"
    words = ["--run", run.output_dir, "--output_dir", target, "--tag", "step-00000006"]
    assert f"written to {target}; load it" in succeed("export", *words)
    assert f"written to {target}, in place of the earlier export; load it" in succeed("export", *words)
    model = AutoModel.from_pretrained(target)
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        hidden = model(**tokenizer("one small model", return_tensors="pt")).last_hidden_state
    assert torch.isfinite(hidden).all()
    card = (target / "README.md").read_text()
    [_, compared] = Comparison.from_record(run.records("result")[-1]["comparison"]).encoders
    assert compared.parameters == sum(p.numel() for name, p in model.named_parameters() if "pooler" not in name)
    assert f"| {compared.parameters:,} (" in card
    for fact in (
        "| optimizer step | 6 |",
        "| hidden-state mapping | 2-4 |",
        f"| teacher | {tiny_world.teacher.name} |",
    ):
        assert fact in card
    assert not list(target.glob("*.bin"))
    names = model.state_dict().keys()
    assert not [name for name in names if "projection" in name]


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "no complete checkpoint" in refuse("export", "--run", tmp_path)
    assert "run" in refuse("export", "--output_dir", "x").removeprefix("error: ")


def test_export_looks_at_the_runs_tokenizer(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished_run(**OTHER_LOSSES).output_dir, tmp_path / "run", symlinks=True)))
    words = ["--run", run.root, "--output_dir", tmp_path / "exported"]
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    tokenizer.add_tokens(["covid"])
    tokenizer.save_pretrained(run.tokenizer)
    assert "has embeddings for 76 tokens, but the tokenizer gives ids up to 76" in refuse("export", *words)
    (run.tokenizer / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.json is a git-lfs pointer" in refuse("export", *words)
    assert not (tmp_path / "exported").exists()


def curves(run: Run, folder: str = "") -> EventAccumulator:
    events = EventAccumulator(str(run.output_dir / folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_has_every_promised_number_by_optimizer_step(finished_run: FinishedRun) -> None:
    run = finished_run(**BF16)
    events = curves(run)
    tags = set(events.Tags()["scalars"])
    promised = {
        "loss/total", "loss/hidden", "loss/attention", "loss/embedding",
        "pair/hidden/1-2", "pair/hidden/2-4", "pair/attention/1-2", "pair/attention/2-4", "pair/embedding",
        "share/hidden", "share/attention", "share/embedding",
        "optimizer/lr", "optimizer/grad_norm", "optimizer/skipped_steps",
        "speed/tokens_per_s", "speed/samples_per_s", "speed/tflops", "speed/data_wait_share",
        "time_share/teacher", "time_share/student", "time_share/optimizer",
        "memory/peak_gib", "result/loss", "result/held_out_loss",
    }  # fmt: skip
    assert promised <= tags, promised - tags
    assert [e.step for e in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    held_out = curves(run, HELD_OUT)
    assert [e.step for e in held_out.Scalars("loss/total")] == [0, 3, 6]
    pairs = {tag for tag in tags if tag.startswith("pair/")}
    assert set(held_out.Tags()["scalars"]) == {"loss/total", *pairs}, "in the charts of training"
    shares = [events.Scalars(f"share/{name}")[0].value for name in ("hidden", "attention", "embedding")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert "config/text_summary" in events.Tags()["tensors"]
    row = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(row).hparams
    assert (values["mapping"].string_value, values["student"].string_value) == ("2-4", "2 x 16")
    assert events.Scalars("result/held_out_loss")[0].value == held_out.Scalars("loss/total")[-1].value
    assert len(list(run.output_dir.glob("events*"))) == 2, "one writer, and a row of the HPARAMS page"


def test_a_student_that_starts_from_an_export_has_its_projections(
    make_run: MakeRun, finished_run: FinishedRun, tmp_path: Path
) -> None:
    first = finished_run(**EVALUATED).copied(tmp_path / "first")
    shape = {"student__layers": "null", "student__hidden_size": "null", "student__init": "null"}
    run = make_run("again", student__path=first.run_dir.student, train__lr=1e-30, train__steps=2, **shape)
    file = first.run_dir.student / "projections.safetensors"
    assert f"projections taken from {file}: embedding, layers\n" in run.finish()
    assert_same_bits(run.projections(), first.projections())
    file.write_bytes(file.read_bytes()[:100])
    assert f"{file} is cut" in refuse_run(make_run("torn", student__path=first.run_dir.student, **shape))


def test_dry_run_prints_the_banner_and_writes_nothing(make_run: MakeRun) -> None:
    run = make_run("run", mapping__hidden="0-3", mapping__attention="4-0")
    output = run.finish("--dry_run")
    assert "student layer      1  2" in output
    assert "teacher hidden     ·  3" in output
    assert "teacher attention  4  ·" in output
    assert "8 sequences = 8 micro batch x 1 accumulation x 1 rank;" in output
    assert "torch fused AdamW" in output
    assert "GiB for each rank" in output
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
def test_mistakes_exit_2_with_one_line(make_run: MakeRun, argv: list[str], says: str) -> None:
    assert says in refuse_run(make_run("run"), *argv)


def test_a_processor_without_fp16_exits_2_with_one_line(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # so that one with fp16 does as one without
    said = only_error(make_run("run", precision="fp16", launcher="none").finish(expect=2))
    assert "fp16 on a CPU needs AVX-512 FP16" in said
    assert "ds_configs/zero0_bf16.json" in said


@pytest.mark.parametrize(
    ("launcher", "argv"),
    [
        ("real", ["--data.eval_sequences", "5000"]),
        ("forked", ["--loss.hiden", "3"]),
        ("forked", ["--output_dir", "/proc/nowhere"]),
    ],
)
def test_the_launcher_shows_a_mistake_once(make_run: MakeRun, launcher: Launcher, argv: list[str]) -> None:
    run = make_run("run", ranks=2, launcher=launcher)
    began = time.monotonic()
    output = run.finish(*argv, expect=2)
    assert len([line for line in output.splitlines() if "error: " in line]) == 1, output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60
    assert not run.run_dir.config.exists()


def test_require_fused_makes_a_fall_back_an_error(make_run: MakeRun) -> None:
    run = make_run("run", stage=0, optim__name="lamb")
    said = only_error(run.finish("--require_fused", expect=2))
    assert "require_fused=true, but DeepSpeed FusedLamb needs CUDA" in said


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"{stage}_fp16", marks=pytest.mark.fp16)
            for stage in ("zero1", "zero2", "zero3", "zero3_offload")
        ),
        "zero0_bf16",
        "zero0_fp32",
    ],
)
def test_shipped_ds_configs_train(make_run: MakeRun, name: str) -> None:
    run = make_run("run", deepspeed_config=FOLDER / f"{name}.json", train__steps=3, train__lr=1e-4)
    run.finish()
    assert [r["step"] for r in run.steps()] == [1, 2, 3]
    assert ("optimizer/loss_scale" in curves(run).Tags()["scalars"]) == name.endswith("fp16")


def test_settings_without_effect_are_warnings(make_run: MakeRun) -> None:
    run = make_run("run")
    output = run.finish(
        "--dry_run", "--data.whole_word_mask", "true", "--loss.temperature", "2", "--mapping.hidden", "2-0"
    )
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3, warnings
    assert "data.whole_word_mask" in warnings[0] + warnings[1] + warnings[2]


def test_other_losses_run_end_to_end(finished_run: FinishedRun) -> None:
    """Relation KL with other head counts, probabilities KL, cosine, logits KL and MLM together, once."""
    run = finished_run(**OTHER_LOSSES)
    first, last = run.steps()[0], run.steps()[-1]
    assert set(first["losses"]) == {"hidden", "embedding", "relation", "cosine", "logits", "mlm"}
    assert last["total"] < first["total"]
    assert json.loads((run.run_dir.student / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
