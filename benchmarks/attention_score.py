"""The attention-score loss with its gradient in one pass against the reference, forward and backward.

usage: python benchmarks/attention_score.py [--rounds 15]
Both take turns (A B A B …) in one process on the same bf16 queries and keys; prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from engine.kernels import reference
from engine.kernels.attention_score import attention_score_mse

SHAPES = [(16, 12, 128, 16, 32), (16, 12, 128, 32, 32), (16, 12, 64, 26, 64), (4, 12, 512, 32, 32)]


def seconds(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], pairs: float) -> float:
    q_s, k_s, q_t, k_t = tensors
    q_s.grad = k_s.grad = None
    began = time.perf_counter()
    scales = {"scale_s": q_s.shape[-1] ** -0.5, "scale_t": q_t.shape[-1] ** -0.5}
    function(q_s, k_s, q_t, k_t, **scales, mask=None, token_pairs=pairs).backward()
    if q_s.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 inputs\n"
    )
    print(
        "| B | heads | L | d student | d teacher | reference, ms | one pass, ms | ratio (min to max) |\n|"
        + " --- |" * 8
    )
    for B, H, L, d_s, d_t in SHAPES:
        make = torch.Generator().manual_seed(0)
        widths = (d_s, d_s, d_t, d_t)
        tensors = [torch.randn(B, H, L, d, generator=make).to(device, torch.bfloat16) for d in widths]
        for tensor in tensors[:2]:
            tensor.requires_grad_()
        times: dict[str, list[float]] = {"reference": [], "one pass": []}
        for turn in range(args.rounds + 2):
            for label, function in (("reference", reference.attention_score_mse), ("one pass", attention_score_mse)):
                spent = seconds(function, tensors, float(B * L * L))
                if turn >= 2:
                    times[label].append(spent * 1000)
        ratios = [a / b for a, b in zip(times["reference"], times["one pass"], strict=True)]
        print(
            f"| {B} | {H} | {L} | {d_s} | {d_t} | {median(times['reference']):.1f} | {median(times['one pass']):.1f} | "
            f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |"
        )


if __name__ == "__main__":
    main()
