"""The losses with their gradients in few passes against the reference, forward and backward.

usage: python benchmarks/loss_kernels.py [--rounds 15]
Both take turns (A B A B …) in one process on the same bf16 tensors; prints markdown tables of medians.
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
from engine.kernels.hidden_mse import hidden_mse

ATTENTION = [(16, 12, 128, 16, 32), (16, 12, 128, 32, 32), (16, 12, 64, 26, 64), (4, 12, 512, 32, 32)]
HIDDEN = [(16, 128, 384), (16, 128, 768), (4, 512, 384)]
WARM_UP = 2


def turns(functions: dict[str, Callable[[], torch.Tensor]], inputs: list[torch.Tensor], rounds: int) -> str:
    """Cells of a table row: median ms of each function, and the ratio first / second."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + WARM_UP):
        for name, function in functions.items():
            for tensor in inputs:
                tensor.grad = None
            began = time.perf_counter()
            function().backward()
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - began))
    before, after = times.values()
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    return f"{median(before):.1f} | {median(after):.1f} | {median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 inputs\n"
    )
    make = torch.Generator().manual_seed(0)

    def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=make).to(device, torch.bfloat16) for shape in shapes]

    print("| B | heads | L | d student | d teacher | reference, ms | one pass, ms | ratio (min to max) |")
    print("|" + " --- |" * 8)
    for B, H, L, d_s, d_t in ATTENTION:
        given = tensors(*((B, H, L, d) for d in (d_s, d_s, d_t, d_t)))
        learning = [tensor.requires_grad_() for tensor in given[:2]]
        settings = {"scale_s": d_s**-0.5, "scale_t": d_t**-0.5, "mask": None, "token_pairs": float(B * L * L)}
        functions = {
            "reference": lambda given=given, settings=settings: reference.attention_score_mse(*given, **settings),
            "one pass": lambda given=given, settings=settings: attention_score_mse(*given, **settings),
        }
        print(f"| {B} | {H} | {L} | {d_s} | {d_t} | {turns(functions, learning, args.rounds)} |")

    print("\n| B | L | width | pads | reference, ms | few passes, ms | ratio (min to max) |")
    print("|" + " --- |" * 7)
    for B, L, D in HIDDEN:
        for padded in (False, True):
            given = tensors((B, L, D), (B, L, D))
            mask = (torch.arange(L, device=device) < L - 1).expand(B, L) if padded else None
            functions = {
                "reference": lambda given=given, mask=mask, n=float(B * L): reference.hidden_mse(*given, mask, n),
                "few passes": lambda given=given, mask=mask, n=float(B * L): hidden_mse(*given, mask, n),
            }
            cells = turns(functions, [given[0].requires_grad_()], args.rounds)
            print(f"| {B} | {L} | {D} | {'yes' if padded else 'no'} | {cells} |")


if __name__ == "__main__":
    main()
