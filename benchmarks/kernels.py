"""Each loss of a layer pair, forward and backward, in each of its implementations, against the plain formula.

    python benchmarks/kernels.py                                # all losses, L = 128 … 8192, fp32 and bf16
    python benchmarks/kernels.py --losses attention --lengths 128 512

"reference" is engine/kernels/reference.py under autograd, which is what TinyBERT's and MiniLM's published code
computes; the others are those of engine/kernels/. All take turns in one process on the same random tensors (their rho
is about 1.4; how errors grow as the student nears the teacher: tests/kernels/). FLOPs are those that an implementation
does, bytes those that it cannot avoid: each input read once, each gradient written once. Errors are relative to the
formula in float64 on the same rounded inputs: of the value, and of the worst gradient in the Frobenius norm. Peak
memory is that of one call above its inputs, in a process of its own."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from measuring import (
    base_memory,
    device_here,
    header,
    in_a_fresh_process,
    machine,
    peak_above,
)

from engine.jobs.measure.turns import take_turns
from engine.kernels.choice import Kernels
from engine.kernels.inputs import Attention, Head, HiddenPairs, MlmLogits, Weights

HEAD_TOKENS = {"cpu": 12 * 1024, "cuda": 12 * 32768}
"""Of a layer of 12 heads: 8 x 128 tokens, and 256 x 128."""
VOCABULARY = 30522
Leaves = list[torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """One row group of a table: a loss at one shape."""

    loss: str
    shape: str
    """What the table calls it."""
    dtype: str
    make: Callable[[torch.device], Leaves]
    """Tensors; the first `learning` of them get gradients."""
    learning: int
    implementations: dict[str, Callable[..., torch.Tensor]]
    flops: dict[str, float]
    """Forward and backward, of each implementation that does other ones than "reference"."""


def random(*shapes: tuple[int, ...], dtype: str) -> Callable[[torch.device], Leaves]:
    def make(device: torch.device) -> Leaves:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes]

    return make


def attention_cells(kind: str, lengths: list[int], dtypes: list[str], device: torch.device) -> Iterator[Cell]:
    for length in lengths:
        for d_s, d_t in ((26, 64), (64, 64)):
            maps = max(2, HEAD_TOKENS[device.type] // length)
            heads = min(12, maps)
            sequences = maps // heads
            shapes = [(sequences, heads, length, d) for d in (d_s, d_s, d_t, d_t)]
            scales = (d_s**-0.5, d_t**-0.5)
            for dtype in dtypes:
                maker = random(*shapes, dtype=dtype)
                of_maps = sequences * heads * length**2
                direct = 2.0 * of_maps * (d_s + d_t) + 4.0 * of_maps * d_s
                gram = sequences * heads * length * (8.0 * d_s * (d_s + d_t) + 4.0 * d_t**2)
                known = scores(scales) if kind == "attention" else probabilities(scales)
                if device.type == "cpu" or dtype == "float32":
                    known = {name: function for name, function in known.items() if name != "triton"}
                flops = {name: gram if name.startswith("gram") else direct for name in known}
                yield Cell(kind, f"L {length}, d {d_s}/{d_t}, {maps} maps", dtype, maker, 2, known, flops)


def scores(scales: tuple[float, float]) -> dict[str, Callable[..., torch.Tensor]]:
    def by(kernels: Kernels) -> Callable[..., torch.Tensor]:
        def loss(*tensors: torch.Tensor) -> torch.Tensor:
            B, _, L, _ = tensors[0].shape
            return kernels.attention_score_mse(Attention(*tensors, *scales), pairs=float(B * L * L))[0]

        return loss

    return {
        "reference": by(Kernels("reference")),
        "tile": by(Kernels("torch", "tile")),
        "gram": by(Kernels("torch", "gram")),
        "gram, float64 sums": by(Kernels("torch", "gram", torch.float64)),
        "triton": by(Kernels("triton", "tile")),
    }


def probabilities(scales: tuple[float, float]) -> dict[str, Callable[..., torch.Tensor]]:
    def by(kernels: Kernels) -> Callable[..., torch.Tensor]:
        def loss(*tensors: torch.Tensor) -> torch.Tensor:
            B, _, L, _ = tensors[0].shape
            return kernels.softmax_kl(Attention(*tensors, *scales), tokens=float(B * L))

        return loss

    return {"reference": by(Kernels("reference")), "tile": by(Kernels("torch")), "triton": by(Kernels("triton"))}


def hidden_cells(dtypes: list[str], device: torch.device) -> Iterator[Cell]:
    tokens = HEAD_TOKENS[device.type] // 12
    for d_s, pairs in ((312, 3), (768, 7)):
        projected = d_s != 768
        for dtype in dtypes:
            states = [(1, tokens, d_s)] * pairs
            shapes = [*states, *([(768, d_s)] if projected else []), *([(1, tokens, 768)] * pairs)]
            known = hidden_states(pairs, projected, tokens)
            if device.type == "cpu" or projected or dtype == "float32":
                known.pop("triton")
            flops = dict.fromkeys(known, pairs * tokens * (6.0 * d_s * 768 if projected else 3.0 * d_s))
            shape = f"{pairs} pairs of {tokens} tokens, {d_s} to 768" + (
                ", one projection" if projected else ", no projection"
            )
            yield Cell("hidden", shape, dtype, random(*shapes, dtype=dtype), pairs + projected, known, flops)


def hidden_states(pairs: int, projected: bool, tokens: int) -> dict[str, Callable[..., torch.Tensor]]:
    def by(kernels: Kernels) -> Callable[..., torch.Tensor]:
        def loss(*tensors: torch.Tensor) -> torch.Tensor:
            weight = tensors[pairs] if projected else None
            total, _ = kernels.hidden_mse(
                HiddenPairs(tensors[:pairs], tensors[pairs + projected :], [1.0] * pairs, float(tokens), weight=weight)
            )
            return total

        return loss

    return {name: by(Kernels(backend)) for name, backend in BACKENDS.items()}


BACKENDS = {"reference": "reference", "few passes": "torch", "triton": "triton"}


def vocabulary_cells(dtypes: list[str], device: torch.device) -> Iterator[Cell]:
    tokens = HEAD_TOKENS[device.type] // 12
    positions = int(0.15 * tokens)
    for d_s in (312, 768):
        shapes = [
            (positions, d_s),
            (VOCABULARY, d_s),
            (VOCABULARY,),
            (positions, 768),
            (VOCABULARY, 768),
            (VOCABULARY,),
        ]
        for dtype in dtypes:
            flops = positions * VOCABULARY * (6.0 * d_s + 2.0 * 768)
            known = {
                "reference": vocabulary_losses(Kernels("reference")),
                "by positions": vocabulary_losses(Kernels("torch")),
            }
            maker = random(*shapes, dtype=dtype)

            def smaller(device: torch.device, maker: Callable[[torch.device], Leaves] = maker) -> Leaves:
                return [0.2 * tensor for tensor in maker(device)]

            shape = f"{positions} masked positions of {tokens}, width {d_s}, {VOCABULARY} tokens"
            yield Cell("vocabulary", shape, dtype, smaller, 3, known, dict.fromkeys(known, flops))


def vocabulary_losses(kernels: Kernels) -> Callable[..., torch.Tensor]:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        count = len(tensors[0])
        labels = torch.arange(count, device=tensors[0].device) * 7 % VOCABULARY
        weights = Weights(kl=1.0, cross_entropy=1.0, temperature=1.0, count=float(count))
        total, _ = kernels.vocabulary_losses(MlmLogits(Head(*tensors[:3]), Head(*tensors[3:]), labels, weights))
        return total

    return loss


def liger_jsd(*tensors: torch.Tensor) -> torch.Tensor:
    """liger-kernel's fused linear JSD at beta 0, which is KL(teacher || student), and its hard-label term."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    count = len(tensors[0])
    labels = torch.arange(count, device=tensors[0].device) * 7 % VOCABULARY
    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=tensors[0].is_cuda)
    return 2.0 * made(tensors[0], tensors[1], tensors[3], tensors[4], labels, tensors[2], tensors[5])


def cells(args: argparse.Namespace, device: torch.device) -> list[Cell]:
    made: list[Cell] = []
    for loss in args.losses:
        if loss in ("attention", "relation"):
            made += attention_cells(loss, args.lengths, args.dtypes, device)
        else:
            made += (hidden_cells if loss == "hidden" else vocabulary_cells)(args.dtypes, device)
    if args.rivals:
        for cell in made:
            cell.implementations["torch.compile of the reference"] = torch.compile(cell.implementations["reference"])
            if cell.loss == "vocabulary":
                cell.implementations["liger-kernel JSD"] = liger_jsd
            for name in cell.implementations:
                cell.flops.setdefault(name, cell.flops["reference"])
    return made


def value_and_gradients(function: Callable[..., torch.Tensor], tensors: Leaves, learning: int) -> Leaves:
    leaves = [tensor.detach().requires_grad_(i < learning) for i, tensor in enumerate(tensors)]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves[:learning] if leaf.grad is not None)]


def errors(exact: Leaves, got: Leaves) -> str:
    value = abs(float((got[0].double() - exact[0]) / exact[0]))
    gradient = max(float((g.double() - e).norm() / e.norm()) for g, e in zip(got[1:], exact[1:], strict=True))
    return f"{value:.0e} | {gradient:.0e}"


def unavoidable_bytes(tensors: Leaves, learning: int) -> float:
    return sum(x.numel() * x.element_size() * (2 if i < learning else 1) for i, x in enumerate(tensors))


def measure(cell: Cell, number: int, args: argparse.Namespace, device: torch.device, env: dict[str, str]) -> None:
    tensors = cell.make(device)
    wide = [tensor.double() for tensor in tensors]
    exact = value_and_gradients(cell.implementations["reference"], wide, cell.learning)
    del wide
    found = {
        name: errors(exact, value_and_gradients(function, tensors, cell.learning))
        for name, function in cell.implementations.items()
    }
    times = take_turns(
        {
            name: functools.partial(value_and_gradients, function, tensors, cell.learning)
            for name, function in cell.implementations.items()
        },
        args.rounds,
        device,
    )
    moved = unavoidable_bytes(tensors, cell.learning)
    for name in cell.implementations:
        peak = in_a_fresh_process(*sys.argv[1:], "--memory", f"{number}:{name}", env=env)
        seconds = times[name].ms / 1000
        faster = times[name].ratio_to(times["reference"])
        print(
            f"| {cell.shape} | {cell.dtype} | {name} | {times[name].ms:.2f} | {faster} | "
            f"{cell.flops[name] / seconds / 1e9:,.0f} | {moved / seconds / 1e9:,.1f} | {peak:,.0f} | {found[name]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["attention", "hidden", "relation", "vocabulary"]
    parser.add_argument("--losses", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="also torch.compile of the reference, and liger-kernel's JSD (GPU: always)",
    )
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = device_here()
    args.rivals = args.rivals or device.type == "cuda"
    made = cells(args, device)
    if args.memory:
        number, _, name = args.memory.partition(":")
        cell = made[int(number)]
        tensors = cell.make(device)
        tensors[0].flatten()[:64].view(8, 8).matmul(
            tensors[0].flatten()[:64].view(8, 8)
        )  # loads the library of products
        base = base_memory(device)
        once = functools.partial(value_and_gradients, cell.implementations[name], tensors, cell.learning)
        print(json.dumps(peak_above(base, once, device)))
        return
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    print(machine(device, ["triton"] if device.type == "cuda" else []))
    for loss in args.losses:
        print(f"\n{loss}\n")
        names = ("case", "dtype", "implementation", "ms", "times as fast", "GFLOP/s", "GB/s", "peak MiB")
        print(header(*names, "value error", "gradient error"))
        for number, cell in enumerate(made):
            if cell.loss == loss:
                measure(cell, number, args, device, env)


if __name__ == "__main__":
    main()
