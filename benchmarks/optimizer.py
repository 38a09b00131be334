"""Which AdamW steps fastest on this machine: the measurement behind `optim.name: adamw`.

usage: python benchmarks/optimizer.py [--parameters 7.3e6] [--rounds 15]
Optimizers take turns (A B C A B C …) on parameters of their own in one process; prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn


def candidates(device: torch.device) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    found: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
        "torch AdamW, loop": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=False, fused=False),
    }
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device.type == "cuda":
        found["DeepSpeed FusedAdam"] = lambda p: FusedAdam(p, lr=1e-4)
    else:
        found["DeepSpeedCPUAdam"] = lambda p: DeepSpeedCPUAdam(p, lr=1e-4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=7.3e6, help="number of parameters (3 x 192 student: 7.3e6)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    optimizers = {}
    for name, make in candidates(device).items():
        # as ZeRO hands them over: one flat fp32 tensor for each parameter group
        parameters = [nn.Parameter(torch.randn(int(args.parameters * share), device=device)) for share in (0.99, 0.01)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers[name] = make(parameters)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(args.rounds + 2):
        for name, optimizer in optimizers.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number >= 2:  # the first rounds allocate the state
                times[name].append(time.perf_counter() - began)
    best = min(statistics.median(values) for values in times.values())
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    size = f"{args.parameters / 1e6:.1f} M parameters"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {size}\n")
    print("| optimizer | median ms | min to max ms | times the fastest |\n|---|---|---|---|")
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        low, mid, high = (1000 * f(values) for f in (min, statistics.median, max))
        print(f"| {name} | {mid:.1f} | {low:.1f} to {high:.1f} | {mid / 1000 / best:.2f} |")


if __name__ == "__main__":
    main()
