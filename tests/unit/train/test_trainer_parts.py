"""Pieces of the loop that need no ranks: loss windows, comparisons at resume, cost and memory arithmetic."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from tiny_world import TinyWorld
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForMaskedLM, BertModel

from engine.config.deepspeed import Execution
from engine.config.distill import RunConfig, TrainConfig
from engine.config.reading import parse_config
from engine.data.batch import Counts
from engine.data.loader import CorpusLoader
from engine.data.share import StepShare
from engine.jobs.distill.ending import closing_table
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import make_plan
from engine.kernels import exact
from engine.mapping import RandomEachStep, mapping_table, parse_mapping
from engine.models.projections import Projections
from engine.models.shape import ModelShape, forward_flops_per_token
from engine.models.student import build_student
from engine.models.teacher import FrozenTeacher
from engine.train.checkpoint_files import FileFacts
from engine.train.checkpoint_storage import _not_seen
from engine.train.loss_window import BadMicroStep, LossWindow, WindowReport
from engine.train.step_report import Interval, Speedometer, StepReport
from engine.train.universal import _own_step_counts, plan_conversion

CPU = torch.device("cpu")


def test_window_averages_over_steps_and_micro_steps() -> None:
    window = LossWindow(2, CPU, length=2, grad_accum_steps=2)
    for step in (1, 2):
        for micro in (0, 1):
            value = torch.tensor(float(10 * step + micro))
            window.add(value, torch.stack([value, 2 * value]), step=step, micro=micro)
    assert window.reduce() == WindowReport([15.5, 15.5, 31.0], [], None)  # of 10, 11, 20, 21
    assert window.reduce() == WindowReport([0.0, 0.0, 0.0], [], None)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_window_names_the_first_micro_step_that_is_not_finite(poison: float) -> None:
    window = LossWindow(2, CPU, length=5, grad_accum_steps=2)
    for step in range(5, 10):
        for micro in (0, 1):
            value = torch.tensor(poison if (step, micro) in ((7, 1), (9, 0)) else 2.0)
            window.add(torch.tensor(1.0), torch.stack([torch.tensor(1.0), value]), step=step, micro=micro)
    report = window.reduce()
    assert report.bad_steps == [7, 9]
    assert report.first_bad == BadMicroStep(step=7, micro=1, rank=0, values=(2,))
    assert report.means == [1.0, 1.0, 2.0], "of the values that are finite"
    window.add(torch.tensor(1.0), torch.ones(2), step=10, micro=0)
    assert window.reduce() == WindowReport([1.0, 1.0, 1.0], [], None), "the next window knows nothing of it"


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(name in str(func) for name in ("_local_scalar_dense", "is_nonzero", "aten.nonzero", "aten.equal")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_micro_step_reads_nothing_back_to_the_host(
    tiny_world: TinyWorld, backend: str, unpadded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, student, losses over padded sequences, backward and the loss window: all but DeepSpeed's own step."""
    monkeypatch.setattr(exact, "_factor", lambda scale, dimensions: scale.reshape([1] * dimensions))  # as on a GPU
    argv = ["--teacher.path", str(tiny_world.teacher), "--data.path", str(tiny_world.corpus), "--loss.relation", "1"]
    plan = make_plan(parse_config(RunConfig, [*argv, "--loss.cosine", "1", "--loss.attention_probs", "1"], "test"))
    wanted = plan.losses.wanted_teacher
    teacher = FrozenTeacher.load(
        plan.teacher, wanted=wanted, dtype=torch.float32, device=CPU, backend=backend, unpadded=unpadded
    )
    student = build_student(plan.config.student, plan.teacher, None, plan.hidden_map, False, 0, backend)
    projections = Projections(plan.config.loss, student_width=32, teacher_width=32, layers=plan.losses.projected_layers)
    module = DistilModule(student, projections, plan.losses, unpadded=unpadded)
    loader = CorpusLoader(tiny_world.corpus, StepShare(8, 8), tokenizer=plan.tokenizer, eval_sequences=8, seed=0)
    inputs = loader.step(0)
    assert inputs.micro[0].attention_mask is not None
    window = LossWindow(len(plan.losses.term_names) + len(plan.losses.observed_names), CPU, length=1)
    with HostReads() as reads:
        total, terms = module(inputs.micro[0], teacher(inputs.micro[0]), inputs.local_counts)
        total.backward()
        window.add(total, terms, step=1, micro=0)
    assert reads.seen == []
    with HostReads() as reads:
        total.item()
    assert reads.seen, "the counter counts"


@pytest.mark.parametrize("head", [False, True])
def test_flops_agree_with_torchs_counter(head: bool) -> None:
    config = BertConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=60,
        attn_implementation="eager",
    )  # fmt: skip
    model = BertForMaskedLM(config) if head else BertModel(config, add_pooling_layer=False)
    check_flops(model.eval(), ModelShape(3, 24, 4, 101, head))


def test_flops_of_shared_layers_count_each_call() -> None:
    config = AlbertConfig(
        vocab_size=101, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=60, attn_implementation="eager",
    )  # fmt: skip
    check_flops(AlbertModel(config, add_pooling_layer=False).eval(), ModelShape(3, 24, 4, 101, False))


def check_flops(model: torch.nn.Module, shape: ModelShape) -> None:
    B, L = 2, 14
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(B, L, dtype=torch.long))
    assert forward_flops_per_token(model, shape, L) * B * L == counter.get_total_flops()


def test_banner_tables() -> None:
    hidden = parse_mapping("0-5-0-10", student_layers=4, teacher_layers=12)
    assert mapping_table(hidden, hidden) == [
        "student layer      1  2  3  4",
        "teacher layer      ·  5  · 10",
    ]
    drawn = RandomEachStep.from_sizes(student_layers=4, teacher_layers=12, key="mapping.hidden")
    assert mapping_table(drawn, drawn) == [
        "student layer      1  2  3  4",
        "teacher layer      3  6  9 12",
        "random-each-step: so for held-out losses; each step draws its own, in ascending order",
    ]
    table = closing_table({"total": 8.0, "off": 0.0}, {"total": 2.0, "off": 0.0}, [("speed", "x")], steps=(10, 300))
    assert table.splitlines()[0].split() == ["loss", "step", "10", "step", "300", "ratio"]
    assert table.splitlines()[1].split() == ["total", "8", "2", "0.250"]
    assert table.splitlines()[2].split() == ["off", "0", "0", "-"]


def test_contributions_of_losses_add_up_to_the_total() -> None:
    report = StepReport(
        interval=Interval(step=1, counts=Counts(), phases={}, wait_s=0.0), total=3.5,
        terms={"hidden/1-2": 1.0, "hidden/2-4": 2.0, "embedding": 2.0}, observed={},
        coefficients={"hidden/1-2": 0.5, "hidden/2-4": 0.5, "embedding": 1.0}, lr=0.1, grad_norm=None, loss_scale=None,
        skipped_steps=0,
    )  # fmt: skip
    assert report.by_loss() == {"hidden": 1.5, "embedding": 2.0}
    assert sum(report.by_loss().values()) == report.total


def test_speeds_leave_out_pauses_and_count_waits_once() -> None:
    speedometer = Speedometer(flops_per_token=1e12)
    speedometer.begin()
    time.sleep(0.01)
    with speedometer.pause():
        time.sleep(0.3)
    counts = Counts(sequences=2, tokens=6, positions=8)
    seconds, speeds = speedometer.read(Interval(step=1, counts=counts, phases={}, wait_s=0.005))
    assert 0.01 <= seconds < 0.3
    assert speeds == {
        "tokens_per_s": 6 / seconds,
        "samples_per_s": 2 / seconds,
        "tflops": pytest.approx(6 / seconds),
        "data_wait_share": 0.005 / seconds,
        "fill": 0.75,
    }
    _, speeds = speedometer.read(Interval(step=2, counts=Counts(), phases={}, wait_s=0.005))
    assert speeds["data_wait_share"] == speeds["fill"] == 0.0


def test_defaults_are_a_valid_run() -> None:
    assert RunConfig().train == TrainConfig()


def test_step_counts_of_a_conversion_are_where_fused_kernels_look() -> None:
    """DeepSpeed's loader leaves one tensor on the CPU for all; the device `meta` stands for a GPU here."""
    weights = [torch.zeros(2, device="meta", requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    step = torch.tensor(7.0)
    for weight in weights:
        optimizer.state[weight] = {"step": step, "exp_avg": torch.zeros_like(weight)}
    _own_step_counts(optimizer)
    steps = [state["step"] for state in optimizer.state.values()]
    assert [int(one) for one in steps] == [7, 7]
    assert steps[0] is not steps[1]
    optimizer.param_groups[0]["fused"] = True
    _own_step_counts(optimizer)
    assert {state["step"].device.type for state in optimizer.state.values()} == {"meta"}


def test_checkpoints_of_versions_that_did_not_write_their_layout_are_continued() -> None:
    execution = Execution("", {}, 2, 2, 2, "float32", 1, False, False)
    assert plan_conversion("step-00000002", saved=execution.facts, execution=execution) is None


def test_step_counts_of_a_run_with_offload_are_numbers() -> None:
    """DeepSpeedCPUAdam counts so; PyTorch's optimizers would refuse to make the first step."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    zeros = {name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[weight] = {"step": 7, **zeros}
    _own_step_counts(optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 8


def test_files_of_other_hosts_that_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.train.checkpoint_storage.SEEN_WITHIN_S", 0.0)
    (tmp_path / "whole").write_bytes(b"abc")
    (tmp_path / "cut").write_bytes(b"a")
    facts = FileFacts.of(b"abc")
    assert _not_seen(tmp_path, {"whole": facts, "cut": facts, "missing": facts}) == ["cut", "missing"]
