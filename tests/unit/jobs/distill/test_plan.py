"""What a run will do, from the preset files of examples/ and from the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import ROOT
from tiny_world import TinyWorld

from engine.config.distill import RunConfig, TrainConfig
from engine.config.reading import parse_config
from engine.errors import UserError
from engine.jobs.distill import banner
from engine.jobs.distill.build import build_module
from engine.jobs.distill.plan import Plan, describe_for_export, identity, make_plan
from engine.records.records import format_record
from engine.records.run_dir import RunDir
from engine.train.checkpoint import Chosen

PRESETS = {
    "tinybert": ("hidden/1-2", "hidden/2-4", "attention/1-2", "attention/2-4", "embedding"),
    "minilmv2": ("relation/qq/2-4", "relation/kk/2-4", "relation/vv/2-4"),
    "last_only": ("hidden/2-4", "attention/2-4", "embedding"),
}
"""File of examples/ -> the terms of 2 layers that learn from 4."""


@pytest.fixture
def plan_of(tiny_world: TinyWorld):
    def plan(*argv: str) -> Plan:
        usual = ["--config", str(ROOT / "examples" / "quickstart.yaml"), "--student.layers", "2"]
        paths = ["--teacher.path", str(tiny_world.teacher), "--data.path", str(tiny_world.corpus)]
        return make_plan(parse_config(RunConfig, [*usual, *paths, "--student.hidden_size", "16", *argv], "test"))

    return plan


def test_a_student_of_few_tokens_runs_without_pads_too(plan_of) -> None:
    module, _ = build_module(plan_of(), torch.device("cpu"), tokens=torch.arange(9))
    assert module.student.get_input_embeddings().weight.shape[0] == 9
    assert module.unpadded


@pytest.mark.parametrize("name", PRESETS)
def test_preset_files_go_on_top_of_another_file(plan_of, name: str) -> None:
    plan = plan_of("--config", str(ROOT / "examples" / f"{name}.yaml"), "--student.init", "uniform")
    assert plan.losses.term_names == PRESETS[name]
    assert (plan.config.train.steps, plan.config.train.global_batch) == (300, 16), "of the quick start"
    assert plan.config.loss.preset == ("tinybert" if name == "tinybert" else "clean")
    assert plan.warnings == ()


@pytest.mark.parametrize(("texts", "sentence"), [(1, "but there is 1:"), (2, "but there are 2:"), (3, None)])
def test_similarity_needs_texts_to_compare(plan_of, texts: int, sentence: str | None) -> None:
    argv = ["--loss.pooled", "1", "--train.global_batch", str(texts), "--loss.pooled_weights"]
    plan_of(*argv, "1", "1", "0")
    if sentence is None:
        plan_of(*argv, "1", "1", "1")
        return
    with pytest.raises(UserError, match=f"loss.pooled_weights.*at least 3, {sentence} raise train.global_batch"):
        plan_of(*argv, "1", "1", "1")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_files_say_how_they_are_used(name: str) -> None:
    first = (ROOT / "examples" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# deepspeed launch/distill.py --config examples/quickstart.yaml --config ")
    assert f"--config examples/{name}.yaml" in first
    assert first.removeprefix("# ") in (ROOT / "docs" / "losses.md").read_text(), "where its command is tested"


def test_the_last_file_wins_and_the_command_line_over_all(tmp_path: Path) -> None:
    files = []
    for name, text in (("a", "seed: 1\ntrain: {steps: 40, lr: 0.1}\n"), ("b", "train: {steps: 50}\nloss: {mlm: 0}\n")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        files += ["--config", str(path)]
    config = parse_config(RunConfig, ["--loss.mlm", "2", *files], "test")
    assert (config.seed, config.train.steps, config.train.lr, config.loss.mlm) == (1, 50, 0.1, 2.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "none; held-out loss every 100 steps, the last step is exported"),
        ({"data.eval_sequences": 0}, "none; no held-out loss, the last step is exported"),
        ({"train.eval_every": 0}, "none; no held-out loss, the last step is exported"),
        (
            {"train.keep_best": "true", "train.eval_every": 1},
            "none; held-out loss every step, the best step is exported",
        ),
        (
            {"train.patience": 2, "train.patience_threshold": 0.1},
            "after 2 evaluations without a better one by more than 0.1 (held-out loss every 100 steps); the best step "
            "is exported",
        ),
    ],
)
def test_which_step_is_exported_is_in_the_banner(plan_of, settings: dict[str, object], says: str) -> None:
    plan = plan_of(*(word for key, value in settings.items() for word in (f"--{key}", str(value))))
    assert banner.describe_stopping(plan) == says


def test_what_a_start_goes_on_from(tmp_path: Path) -> None:
    train, run_dir = TrainConfig(steps=9, patience=2), RunDir(tmp_path)
    chosen = Chosen("step-00000004", None, ())
    assert banner.describe_continuing(None, run_dir, train) == "fresh"
    assert banner.describe_continuing(chosen, run_dir, train) == "continues from step-00000004"
    assert "the run is finished" in banner.describe_continuing(Chosen("step-00000009", None, ()), run_dir, train)
    run_dir.records.write_text(format_record("result", steps_run=4, bad_evaluations=2) + "\n")
    assert "ended early, so the run is finished; to train longer, set more train.patience" in (
        banner.describe_continuing(chosen, run_dir, train)
    )
    assert "continues" in banner.describe_continuing(chosen, run_dir, replace(train, patience=3))
    assert "continues" in banner.describe_continuing(replace(chosen, changes=("loss.mlm: 1 -> 2",)), run_dir, train)


def test_random_each_step_is_what_a_run_says_of_itself(plan_of) -> None:
    plan = plan_of("--mapping.hidden", "random-each-step", "--student.init", "uniform")
    assert plan.losses.term_names[:2] == ("hidden/1-random", "hidden/2-random")
    known = identity(plan)
    assert known["mapping.hidden"] == known["mapping.hidden_resolved"] == "random-each-step"
    assert known["mapping.attention_resolved"] == "random-each-step"
    description = describe_for_export(plan, plan.student_config)
    card = description["card"]
    assert card["hidden-state mapping"] == card["attention mapping"] == "random-each-step"
    assert (description["base_model"], description["licences"]) == ("teacher", [])
    assert card["licence of the teacher"] == "not named in its card"
    assert card["hardware"].startswith("1 rank of 1 thread on ")
    assert f"torch {torch.__version__}" in card["libraries"]
    assert plan.warnings == ()
    with pytest.raises(UserError, match="5 student layers, but the teacher has 4"):
        plan_of("--mapping.hidden", "random-each-step", "--student.layers", "5", "--student.init", "random")
