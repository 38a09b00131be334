"""One rank of the all-reduce that launch/check_hosts.py times over all hosts; prints one line of JSON."""

from __future__ import annotations

import datetime
import json
import sys
import time

import torch
from torch import distributed as dist

SMALL, LARGE = 2**20, 2**24
"""Bytes of a tensor. The large one is for networks that move the small one within SLOW_S seconds."""
SLOW_S = 0.2
ROUNDS = 4


def seconds_each(tensor: torch.Tensor, rounds: int) -> float:
    """Returns the seconds of one all-reduce on the slowest rank."""
    dist.all_reduce(tensor)  # the first one makes connections
    _finish(tensor)
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    _finish(tensor)
    taken = torch.tensor([(time.perf_counter() - start) / rounds], dtype=torch.float64, device=tensor.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _finish(tensor: torch.Tensor) -> None:
    """Waits for what runs on its GPU: NCCL's calls return before their work is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main(backend: str, timeout_s: float) -> None:
    """Prints the latency in ms and the bandwidth in Gbit/s of an all-reduce. Collective."""
    device = "cuda:0" if backend == "nccl" else "cpu"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    world = dist.get_world_size()
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    assert ones.item() == world, f"{world} ranks add up to {ones.item()}"
    latency = seconds_each(ones, 20)
    size = SMALL
    taken = seconds_each(torch.zeros(size // 4, device=device), ROUNDS)
    if taken < SLOW_S:
        size = LARGE
        taken = seconds_each(torch.zeros(size // 4, device=device), ROUNDS)
    dist.destroy_process_group()
    # what each host sends, and receives, in an all-reduce that wastes nothing
    bits = 8 * size * 2 * (world - 1) / world
    print(json.dumps({"latency_ms": latency * 1e3, "mib": size / 2**20, "gbit_per_s": bits / taken / 1e9}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
