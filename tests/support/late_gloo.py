"""One of two ranks: a thread of Gloo asks for Python's lock while rank 1, whose work is done, ends.

usage: late_gloo.py RANK STORE [plain]    plain: ends as Python does, without engine/ranks/exit.py
"""

from __future__ import annotations

import sys
import time

import torch
from torch import distributed as dist

from engine.ranks.exit import run_rank

rank, store, *plain = sys.argv[1:]
kept = []  # a reference to the group, as DeepSpeed keeps one


def main() -> int:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    kept.append(dist.group.WORLD)
    dist.barrier()
    sys.setswitchinterval(1000)  # nobody is given Python's lock before this thread waits for something
    if rank == "0":
        time.sleep(1)
    dist.all_reduce(torch.ones(4), async_op=True)  # rank 1's ends a second later, in a thread of Gloo
    dist.destroy_process_group()
    print("work is done", flush=True)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        pass
    return 0


if plain:
    sys.exit(main())
run_rank(main)
