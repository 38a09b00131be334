"""A frozen teacher's linear maps on a CPU in bf16: nn.Linear against FrozenLinear (engine/models/frozen_linear.py),
which lays weights out once and computes queries, keys and values as one product.

    python benchmarks/frozen_linear.py

Both take turns in one process, over a few layers' weights in turn, so that none is in the processor's cache for longer
than in a real pass."""

from __future__ import annotations

import argparse
from itertools import cycle

import torch
from measuring import header, machine
from torch import nn

from engine.jobs.measure.turns import take_turns
from engine.models.frozen_linear import FrozenLinear
from engine.ranks import allocator

MAPS = {
    "queries, keys, values": (768, (768, 768, 768)),
    "output": (768, (768,)),
    "up": (768, (3072,)),
    "down": (3072, (768,)),
}
LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    allocator.keep_freed_memory()
    device = torch.device("cpu")
    print(machine(device) + "\n")
    print(header("maps", "tokens", "nn.Linear, ms", "FrozenLinear, ms", "times as fast (min to max)"))
    torch.manual_seed(0)
    for name, (features, widths) in MAPS.items():
        layers = [[nn.Linear(features, width).bfloat16() for width in widths] for _ in range(LAYERS)]
        frozen = [FrozenLinear(maps) for maps in layers]
        for tokens in args.tokens:
            x = torch.randn(tokens, features).bfloat16()
            plain, packed = cycle(layers), cycle(frozen)
            with torch.no_grad():
                functions = {
                    "nn.Linear": lambda x=x, plain=plain: [one(x) for one in next(plain)],
                    "FrozenLinear": lambda x=x, packed=packed: next(packed)(x),
                }
                times = take_turns(functions, args.rounds, device)
            cells = " | ".join(f"{times[which].ms:.2f}" for which in functions)
            gain = times["FrozenLinear"].ratio_to(times["nn.Linear"])
            print(f"| {name} {features} to {sum(widths)} | {tokens} | {cells} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
