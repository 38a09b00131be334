"""What a run is said to need of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from launching import ROOT
from tiny_world import TinyWorld

from engine.config.deepspeed import resolve_execution
from engine.config.deepspeed_file import FOLDER
from engine.config.distill import OptimConfig, RunConfig, TrainConfig
from engine.config.reading import parse_config
from engine.jobs.distill.build import load_teacher
from engine.jobs.distill.memory import MemoryEstimate, estimate_memory, state_bytes
from engine.jobs.distill.plan import make_plan


@pytest.mark.parametrize(
    ("name", "world", "bytes_per_parameter", "offloaded"),
    [  # weights + gradients + optimizer
        ("zero0_bf16", 4, 2 + 2 + 12, 0),
        ("zero1_bf16", 4, 2 + 2 + 3, 0),
        ("zero2_bf16", 4, 2 + 0.5 + 3, 0),
        ("zero3_bf16", 4, 0.5 + 0.5 + 3, 0),
        ("zero3_offload_bf16", 4, 0.5, 0.5 + 3),
        ("zero0_fp32", 1, 4 + 4 + 8, 0),
    ],
)
def test_states_follow_the_zero_paper(name: str, world: int, bytes_per_parameter: float, offloaded: float) -> None:
    execution = resolve_execution(TrainConfig(), OptimConfig(), FOLDER / f"{name}.json", world)
    assert state_bytes(1000, execution) == pytest.approx((1000 * bytes_per_parameter, 1000 * offloaded))


def test_parts_of_a_run(tiny_world: TinyWorld) -> None:
    """Two layers of width 16 with eager attention learn relations of queries, keys and values from one layer."""
    paths = ["--teacher.path", str(tiny_world.teacher), "--data.path", str(tiny_world.corpus)]
    files = [word for name in ("quickstart", "minilmv2") for word in ("--config", str(ROOT / f"examples/{name}.yaml"))]
    student = ["--student.layers", "2", "--student.hidden_size", "16", "--student.attention", "eager"]
    words = [
        *files,
        *paths,
        *student,
        "--deepspeed_config",
        str(FOLDER / "zero0_fp32.json"),
        "--kernels.backend",
        "reference",
    ]
    plan = make_plan(parse_config(RunConfig, words, "test"))
    teacher = load_teacher(plan, plan.losses.wanted_teacher, torch.device("cpu"))
    tokens = plan.execution.micro_batch_size * plan.seq_len
    scores = plan.student_shape.heads * plan.seq_len * tokens
    assert estimate_memory(plan, teacher, 1000) == MemoryEstimate(
        teacher=4.0 * teacher.parameters_count,
        student_states=16_000.0,
        activations=2 * 2 * (34.0 * 16 * tokens + 5.0 * scores),
        captured=4.0 * 3 * plan.teacher_shape.width * tokens,
        loss_maps=3 * 4.5 * 4 * scores,
        host_states=0.0,
    )


GIB = 2**30
ESTIMATE = MemoryEstimate(
    teacher=GIB, student_states=4 * GIB, activations=2 * GIB, captured=GIB, loss_maps=0.004 * GIB, host_states=0.0
)


def test_device_memory_in_words() -> None:
    assert ESTIMATE.on_gpu() == (
        "about 8.00 GiB per rank plus allocator slack: teacher 1.00, student's weights, gradients and optimizer 4.00"
        ", its activations 2.00, captured tensors 1.00"
    )
    assert replace(ESTIMATE, host_states=GIB).on_gpu().endswith(", and 1.00 in host memory")


def test_memory_of_a_process_in_words() -> None:
    """Teacher and the student's fp32 weights are in what it has already; offload moves nothing out of it."""
    assert replace(ESTIMATE, host_states=GIB).in_process(resident=10 * GIB, parameters=GIB // 4) == (
        "about 17.00 GiB for each rank's process: now 10.00, student's gradients and optimizer 4.00, its activations "
        "2.00, captured tensors 1.00"
    )
