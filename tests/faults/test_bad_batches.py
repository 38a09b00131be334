"""Losses that are not finite, and memory that is not there: the record says where, and what to do."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from faulting import assert_gone, end, start_again
from launching import Run, write_ds_config
from safetensors.torch import load_file, save_file
from tiny_world import save_tiny_teacher, write_text

from engine.config.tools import PrepareConfig, SourceConfig
from engine.data.manifest import load_manifest
from engine.data.prepare.corpus import prepare
from engine.data.shards import SequenceStore
from engine.train.checkpoint_files import load_full_state

pytestmark = pytest.mark.faults


@dataclass(frozen=True)
class Poison:
    """A teacher whose embedding of the letter q is so large that its norm is not a number, and a corpus with q in a few
    sequences."""

    teacher: Path
    corpus: Path
    bad: frozenset[int]
    """Numbers of those sequences."""


@pytest.fixture(scope="module")
def poison(tmp_path_factory: pytest.TempPathFactory) -> Poison:
    root = tmp_path_factory.mktemp("poison")
    save_tiny_teacher(root / "teacher")
    from transformers import AutoTokenizer

    letter = AutoTokenizer.from_pretrained(root / "teacher").convert_tokens_to_ids("q")
    weights = load_file(root / "teacher" / "model.safetensors")
    embedding = weights["bert.embeddings.word_embeddings.weight"][letter]
    embedding[::2], embedding[1::2] = 3e38, -3e38
    save_file(weights, root / "teacher" / "model.safetensors", metadata={"format": "pt"})
    write_text(root / "text.txt", 300)
    lines = (root / "text.txt").read_text().splitlines()
    lines[200] = lines[500] = "The q model."
    (root / "text.txt").write_text("\n".join(lines))
    prepare(
        PrepareConfig(
            sources=[SourceConfig(path=str(root / "text.txt"))],
            output_dir=str(root / "corpus"),
            tokenizer=str(root / "teacher"),
            seq_len=16,
            min_tokens=2,
            workers=1,
        )
    )
    store = SequenceStore(root / "corpus", load_manifest(root / "corpus"))
    bad = frozenset(i for i, ids in enumerate(store.rows(range(len(store)))) if letter in ids)
    assert 0 < len(bad) < 8
    return Poison(root / "teacher", root / "corpus", bad)


def settings(poison: Poison, **more: object) -> dict[str, object]:
    return {
        "teacher__path": poison.teacher,
        "student__init": "random",  # else the student would have the same embedding
        "data__path": poison.corpus,
        "train__steps": 120,  # an epoch
        "train__log_every": 5,
        "micro": 2,
        **more,
    }


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("stage", "ranks", "precision"),
    [
        (3, 2, "bf16"),
        pytest.param(0, 1, "fp32", marks=pytest.mark.thorough),
        pytest.param(1, 2, "fp32", marks=pytest.mark.thorough),
        pytest.param(2, 2, "bf16", marks=pytest.mark.thorough),
    ],
)
def test_a_bad_batch_is_named_with_losses_layers_and_sequences(
    make_run, poison: Poison, stage: int, ranks: int, precision: str
) -> None:
    run = make_run("run", ranks=ranks, stage=stage, precision=precision, **settings(poison))
    output = run.finish(expect=3)
    error = run.records("error")[-1]
    assert error["status"] == "diverged"
    assert len(error["sequences"]) == 2, "a micro batch"
    assert poison.bad & set(error["sequences"])
    assert error["terms"] == ["hidden/1-2", "hidden/2-4", "attention/1-2", "attention/2-4", "embedding"]
    assert f"the loss is not finite in step {error['step']}" in output
    assert f"rank {error['rank']}, sequences {error['sequences'][0]}" in output
    assert not run.run_dir.complete_tags()


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("stage", "ranks", "precision"),
    [
        (0, 1, "fp32"),
        pytest.param(3, 2, "fp32", marks=pytest.mark.thorough),
        pytest.param(0, 1, "bf16", marks=pytest.mark.thorough),
        pytest.param(1, 1, "bf16", marks=pytest.mark.thorough),
        pytest.param(0, 2, "fp32", marks=pytest.mark.thorough),
        pytest.param(1, 2, "fp32", marks=pytest.mark.thorough),
        pytest.param(2, 2, "bf16", marks=pytest.mark.thorough),
        pytest.param(3, 2, "bf16", marks=pytest.mark.thorough),
    ],
)
def test_bad_batches_are_left_out_up_to_a_cap(make_run, poison: Poison, stage: int, ranks: int, precision: str) -> None:
    skipping = settings(poison, train__skip_bad_steps=20)
    run = make_run("run", stage=stage, precision=precision, ranks=ranks, **skipping)
    output = run.finish()
    skipped = [record for record in run.records("error") if record["status"] == "skipped"]
    assert skipped
    assert skipped[-1]["skipped"] == sum(len(record["bad_steps"]) for record in skipped) <= 20
    assert all(poison.bad & set(record["sequences"]) for record in skipped)
    assert "left out (1 of at most 20)" in output
    assert all(value is not None for value in run.curve())
    state = load_full_state(run.run_dir.checkpoints, run.run_dir.complete_tags()[-1])
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert run.curve()[-1] < 0.9 * run.curve()[0], "the other batches were learnt from"


@pytest.mark.thorough
def test_more_bad_batches_than_allowed_end_the_run(make_run, poison: Poison) -> None:
    run = make_run("run", stage=1, **settings(poison, train__skip_bad_steps=1))
    output = run.finish(expect=3)
    assert [record["status"] for record in run.records("error")] == ["skipped", "diverged"]
    assert "more than train.skip_bad_steps=1 of them" in output


@pytest.mark.fp16
@pytest.mark.thorough
def test_an_overflow_at_the_smallest_loss_scale_names_its_batch(make_run, poison: Poison, tmp_path: Path) -> None:
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 0, "min_loss_scale": 1, "hysteresis": 1}
    zero = {"stage": 1}
    ds = write_ds_config(tmp_path / "fp16", train_micro_batch_size_per_gpu=2, zero_optimization=zero, fp16=fp16)
    run = make_run("run", **settings(poison))
    output = run.finish("--deepspeed_config", str(ds), expect=3)
    error = run.records("error")[-1]
    assert error["status"] == "diverged"
    assert poison.bad & set(error["sequences"])
    assert "embedding" in error["terms"]
    assert f"gradients overflow fp16 at the smallest loss scale in step {error['step']} (terms: " in output
    assert f"rank 0, sequences {error['sequences'][0]}" in output
    assert not run.run_dir.complete_tags()


def without_memory(run: Run, limit: int) -> str:
    """Starts it, limits the address space of the rank to `limit` bytes more than it has, and returns its output."""
    process = start_again(run)
    try:
        used = int((Path("/proc") / str(process.pid) / "statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.pid, resource.RLIMIT_AS, (used + limit, used + limit))
        process.wait(timeout=100)
        assert_gone(process.pid, within_s=10)
    finally:
        output = end(run, process)
    assert process.returncode == 1, output[-3000:]
    assert "train_micro_batch_size_per_gpu" in output
    assert "Traceback" not in output
    return output


def test_no_memory_for_a_micro_step(make_run) -> None:
    """Room for the batches; the activations do not fit, and the allocator says so."""
    rows = 1 << 16
    run = make_run("run", stage=0, train__global_batch=rows, train__steps=1000, micro=rows)
    output = without_memory(run, 700 << 20)
    error = run.records("error")[-1]
    assert (error["status"], error["step"]) == ("out_of_memory", 1)
    assert error["shape"] == [rows, 16]
    assert len(error["sequences"]) == 1024, "the first of them"
    assert "out of memory in step 1 on rank 0" in output


@pytest.mark.thorough
def test_no_memory_for_the_batches(make_run) -> None:
    """They are made in a thread of their own."""
    rows = 1 << 20
    run = make_run("run", stage=0, train__global_batch=rows, train__steps=1000, micro=rows)
    output = without_memory(run, 300 << 20)
    error = run.records("error")[-1]
    assert (error["status"], error["step"]) == ("out_of_memory", 0)
    assert "out of memory after step 0 on rank 0" in output
