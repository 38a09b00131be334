"""How the time and the memory of our step grow with length, depth, batch, ranks and ZeRO stage, one at a time.

    python benchmarks/scaling.py                                  # 12 x 768 to 4 x 312 in bf16 on a CPU

Each cell is a process of its own, started by the deepspeed launcher; within a round all cells of a table take turns,
and a cell's time is the median of its rounds (each the median of some steps). "per token" is against the first row of a
table: what stays at 1.00 grows in proportion. Ranks share the machine's cores and split the batch. Peak memory is that
of one rank, above its libraries."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from measuring import base_memory, header, machine, peak_above
from step import LEVERS, STUDENTS, Ours, make_batch, student_step

from engine.jobs.measure.turns import take_turns
from engine.mapping import LayerMapping
from engine.ranks.runtime import join_ranks

LAYERS = {2: (5, 10), 4: (0, 5, 0, 10), 6: (0, 3, 0, 6, 0, 10), 8: (0, 2, 0, 5, 0, 8, 0, 10)}
STUDENTS |= {f"{layers}x312": (LayerMapping(genes, 12), 312, 1200) for layers, genes in LAYERS.items()}
STEPS = 5


@dataclass(frozen=True)
class Cell:
    layers: int = 4
    sequences: int = 8
    length: int = 128
    ranks: int = 1
    zero_stage: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


BASE = Cell()
TABLES = {
    "length, 2048 tokens in all": [
        replace(BASE, sequences=2048 // length, length=length) for length in (64, 128, 256, 512, 1024, 2048)
    ],
    "sequences": [replace(BASE, sequences=count) for count in (4, 8, 16, 32, 64)],
    "student layers": [replace(BASE, layers=layers) for layers in LAYERS],
    "ranks and ZeRO stage": [
        replace(BASE, ranks=ranks, zero_stage=stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)
    ],
}


def run_cell(cell: Cell) -> None:
    """In a process of the launcher: prints ms of a step, its parts, and MiB."""
    runtime = join_ranks(0)
    setting = replace(LEVERS[-1], zero_stage=cell.zero_stage)
    ours = Ours(setting, f"{cell.layers}x312", cell.length, cell.sequences, runtime.device)
    batch = make_batch(cell.sequences // runtime.world_size, cell.length, 0.0, runtime.device)
    base = base_memory(runtime.device)
    teacher, engine = ours.teacher(), ours.model()

    def step() -> None:
        student_step(engine, batch, teacher(batch), last_user=True)

    peak = peak_above(base, lambda: [step(), step()], runtime.device)
    features = teacher(batch)
    parts = {"step": step, "teacher": lambda: teacher(batch), "student": lambda: student_step(engine, batch, features)}
    times = take_turns(parts, STEPS, runtime.device)
    if runtime.is_rank_zero:
        print(json.dumps({**{name: took.ms for name, took in times.items()}, "peak": peak}), flush=True)
    torch.distributed.destroy_process_group()


def start(cell: Cell) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(cell.ranks)]
    words = [*launcher, "--master_port", port, __file__, "--cell", json.dumps(asdict(cell))]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"step"')]
    if done.returncode or not found:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    numbers: dict[str, float] = json.loads(found[-1])
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run_cell(Cell(**json.loads(args.cell)))
        return
    print(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), ["transformers", "deepspeed"]))
    for title in args.tables:
        cells = TABLES[title]
        found: list[list[dict[str, float]]] = [[] for _ in cells]
        for _ in range(args.rounds):
            for numbers, cell in zip(found, cells, strict=True):
                numbers.append(start(cell))
        print(f"\nBy {title}\n")
        print(
            header(
                "student",
                "batch",
                "ranks",
                "ZeRO",
                "step, ms (min to max)",
                "teacher",
                "student",
                "per token",
                "peak MiB",
            )
        )
        first = median(one["step"] for one in found[0]) / cells[0].tokens
        for numbers, cell in zip(found, cells, strict=True):
            took = sorted(one["step"] for one in numbers)
            parts = " | ".join(f"{median(one[part] for one in numbers):.0f}" for part in ("teacher", "student"))
            print(
                f"| {cell.layers}x312 | {cell.sequences} x {cell.length} | {cell.ranks} | {cell.zero_stage} | "
                f"{median(took):.0f} ({took[0]:.0f} to {took[-1]:.0f}) | {parts} | "
                f"{median(took) / cell.tokens / first:.2f} | {median(one['peak'] for one in numbers):,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
