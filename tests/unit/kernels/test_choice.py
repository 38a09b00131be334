"""Which loss kernels a run gets, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT

from engine.config.distill import KernelConfig
from engine.errors import UserError
from engine.kernels import choice
from engine.kernels.choice import Kernels, choose_kernels
from engine.kernels.inputs import Attention

CPU = torch.device("cpu")


def choose(length: int = 128, *, tinybert: bool = False, **config: str) -> Kernels:
    return choose_kernels(KernelConfig(**config), device=CPU, seq_len=length, tinybert=tinybert)  # type: ignore[arg-type]


def test_by_default_a_cpu_takes_pytorch_with_tiles_for_short_sequences_and_gram_matrices_for_long_ones() -> None:
    edge = choice.GRAM_FROM["cpu"]
    assert (choose(edge - 1).backend, choose(edge - 1).attention) == ("torch", "tile")
    assert (choose(edge).backend, choose(edge).attention) == ("torch", "gram")
    assert choose(edge).gram_sums == torch.float64
    text = choose(edge).describe(["attention"])
    assert f"attention scores by Gram matrices, summed in float64 (auto: measured faster at length {edge})" in text


def test_words_of_the_banner_are_about_the_losses_that_are_on() -> None:
    on, other = choose().describe(["hidden", "attention"]), choose().describe(["relation"])
    assert other == "PyTorch, values and gradients in one pass (auto: on a CPU)"
    assert on == f"{other}; attention scores by tiles (auto: measured faster at length 128)"


def test_the_cut_off_of_tinybert_needs_tiles() -> None:
    chosen = choose(4096, tinybert=True)
    assert chosen.attention == "tile"
    assert "by tiles (auto: loss.preset=tinybert leaves out single scores)" in chosen.describe(["attention"])
    with pytest.raises(UserError, match=r"kernels\.attention=gram.*tile or auto"):
        choose(attention="gram", tinybert=True)


def test_what_is_asked_for_is_taken() -> None:
    assert choose(8192, attention="tile").attention == "tile"
    asked = choose(16, attention="gram", gram_sums="float32")
    assert (asked.attention, asked.gram_sums) == ("gram", torch.float32)
    assert "by tiles (kernels.attention=tile)" in choose(8192, attention="tile").describe(["attention"])
    assert "by autograd (kernels.backend=reference)" in choose(backend="reference").describe(["attention"])


def test_triton_without_a_gpu_or_without_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"kernels\.backend=triton.*needs a GPU.*write auto or torch"):
        choose(backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(backend="triton").backend == "triton"
    with pytest.raises(UserError, match=r"kernels\.backend=triton.*16 bits.*float32"):
        choose_kernels(
            KernelConfig(backend="triton"), device=CPU, seq_len=8, tinybert=False, precisions=("bfloat16", "float32")
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"kernels\.backend=triton.*not installed"):
        choose(backend="triton")


def test_a_run_that_asks_for_triton_on_a_cpu_ends_with_one_line_and_exit_code_2(tiny_world, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton runs on it")
    words = [sys.executable, "launch/distill.py", "--dry_run", "--output_dir", str(tmp_path / "run")]
    words += ["--teacher.path", str(tiny_world.teacher), "--data.path", str(tiny_world.corpus)]
    words += ["--student.layers", "2", "--kernels.backend", "triton"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "kernels.backend=triton" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_grouped_heads_give_the_same_by_every_backend() -> None:
    make = torch.Generator().manual_seed(0)
    q_s, q_t = (torch.randn(2, 6, 20, d, generator=make, dtype=torch.float64) for d in (8, 12))
    k_s, k_t = (torch.randn(2, h, 20, d, generator=make, dtype=torch.float64) for h, d in ((2, 8), (3, 12)))
    found = []
    for kernels in (Kernels("reference"), Kernels("torch", "tile"), Kernels("torch", "gram")):
        leaves = [x.clone().requires_grad_() for x in (q_s, k_s)]
        inputs = Attention(*leaves, q_t, k_t, 8**-0.5, 12**-0.5)
        value, target = kernels.attention_score_mse(inputs, pairs=800.0)
        kl = kernels.softmax_kl(inputs, tokens=40.0)
        (value + kl).backward()
        found.append([value.detach(), target, kl.detach(), *(leaf.grad for leaf in leaves)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
