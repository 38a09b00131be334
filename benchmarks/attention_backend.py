"""Times sdpa against eager attention in a small student's layers: python benchmarks/attention_backend.py

Forward alone (a teacher) and forward + backward (a student), no dropout, 2048 tokens a batch. Both backends take turns
within one process (A B A B …) and medians are compared, so that other load on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from measuring import machine
from transformers import BertConfig, BertModel

from engine.data.batch import Batch, Counts
from engine.models.capture import capture
from engine.models.features import Wanted
from engine.models.install import install

BACKENDS = ("sdpa", "eager")


def build(heads: int, args: argparse.Namespace, device: torch.device) -> dict[str, BertModel]:
    config = BertConfig(
        vocab_size=1000,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        intermediate_size=4 * args.width,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    models = {}
    for backend in BACKENDS:
        torch.manual_seed(0)
        # each its own configuration: the attention implementation lives there, and models may share one
        models[backend] = BertModel(copy.deepcopy(config), add_pooling_layer=False).to(device)  # type: ignore[arg-type]
        install(models[backend], backend)
    assert len({model.config._attn_implementation for model in models.values()}) == len(BACKENDS)
    return models


def make_batch(length: int, args: argparse.Namespace, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (max(1, args.tokens // length), length), generator=generator).to(device)
    mask = None
    if args.padded:
        mask = torch.ones_like(ids)
        mask[::2, length * 3 // 4 :] = 0
    return Batch(ids, mask, None, Counts())


def one_pass(model: BertModel, batch: Batch, dtype: torch.dtype, backward: bool) -> None:
    """The teacher (forward) or student (forward + backward) part of a step: last hidden state and one layer's Q, K."""
    last = model.config.num_hidden_layers
    wanted = Wanted(hidden=frozenset({last}), attention=frozenset({last}))
    device = batch.input_ids.device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with torch.set_grad_enabled(backward), autocast:
        features = capture(model, batch, wanted)
    if backward:
        (features.hidden[last].float().square().mean() + features.query[last].float().square().mean()).backward()
        model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved_medians(passes: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median wall time in ms of each pass; at least 5 rounds."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()  # warm-up
    start = time.perf_counter()
    while len(times[BACKENDS[0]]) < 5 or time.perf_counter() - start < seconds:
        for name, run in passes.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 suffers least from other load")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--head_dims", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each pair of measurements")
    parser.add_argument("--padded", action="store_true", help="pad a quarter of every second sequence")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    print(machine(device, ["transformers"]))
    print(f"{args.layers} layers x {args.width}, {args.tokens} tokens, {'padded' if args.padded else 'no pads'}; ms\n")
    print("| dtype | length | head | forward sdpa | forward eager | eager/sdpa | both sdpa | both eager | eager/sdpa |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for length in args.lengths:
            batch = make_batch(length, args, device)
            for head_dim in args.head_dims:
                models = build(args.width // head_dim, args, device)
                cells = [str(dtype).removeprefix("torch."), str(length), str(head_dim)]
                for backward in (False, True):
                    passes = {name: partial(one_pass, model, batch, dtype, backward) for name, model in models.items()}
                    ms = interleaved_medians(passes, args.seconds)
                    cells += [f"{ms['sdpa']:.1f}", f"{ms['eager']:.1f}", f"{ms['eager'] / ms['sdpa']:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
