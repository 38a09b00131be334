"""An exported student beside its teacher, at the end of a distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT
from tiny_world import TinyWorld

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.jobs.distill.build import initial_student
from engine.jobs.distill.comparison import compare_with_teacher
from engine.jobs.distill.plan import Plan, describe_for_export, make_plan
from engine.records.history import History
from engine.records.run_dir import RunDir
from engine.train.export import write_model

Finished = tuple[Plan, RunDir, dict[str, Any]]


@pytest.fixture
def finished(tiny_world: TinyWorld, tmp_path: Path) -> Finished:
    """A student of 2 layers x 16 that was exported without a step."""
    words = ["--config", str(ROOT / "examples" / "quickstart.yaml"), "--student.layers", "2"]
    words += ["--student.hidden_size", "16", "--data.path", str(tiny_world.corpus)]
    plan = make_plan(parse_config(RunConfig, [*words, "--teacher.path", str(tiny_world.teacher)], "test"))
    student = initial_student(plan, with_mlm_head=False)
    description = describe_for_export(plan, student.config) | {"step": 0}
    run_dir = RunDir(tmp_path)
    plan.tokenizer.save_pretrained(run_dir.tokenizer)
    write_model(student, description, {}, run_dir.tokenizer, run_dir.student, history=History())
    return plan, run_dir, description


def compare(finished: Finished) -> tuple[Any, list[str]]:
    lines: list[str] = []
    plan, run_dir, description = finished
    found = compare_with_teacher(plan, run_dir, description, device=torch.device("cpu"), tell=lines.append)
    return found, lines


def test_the_card_gets_what_was_measured(finished: Finished) -> None:
    card = finished[1].student / "README.md"
    before = card.read_text()
    found, lines = compare(finished)
    assert [encoder.name for encoder in found.encoders] == ["teacher", "student"]
    assert (found.seq_len, found.batch_sizes, found.dtype) == (16, [1, 32], "float32")
    assert 0.1 < found.encoders[1].parameters / found.encoders[0].parameters < 0.5
    after = card.read_text()
    table = "\n".join(f"| {' | '.join(row)} |" for row in found.rows()[1:])
    assert table in after
    assert after.replace(after[after.index("## Size") : after.index("## How")], "") == before
    assert lines == ["measuring size and speed of student and teacher (measure=false skips this)"]


def test_a_gpu_without_room_costs_the_comparison_alone(finished: Finished) -> None:
    def refuse_memory(module: torch.nn.Module, inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    card = (finished[1].student / "README.md").read_text()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse_memory)
    try:
        found, lines = compare(finished)
    finally:
        hook.remove()
    assert found is None
    [line] = lines[1:]
    assert line.startswith("not measured: out of memory at 1 x 16 and 32 x 16 tokens (CUDA out of memory. Tried")
    assert line.endswith(f". To measure by hand: python launch/measure.py --models {finished[1].root}")
    assert (finished[1].student / "README.md").read_text() == card
