"""What a whole distillation step costs: a naive one from the formula, the same with a frozen teacher, and ours with one
lever after the other; beside them the limit, the same FLOPs at the rate of this machine's matrix products.

    python benchmarks/step.py                                   # 12 x 768 to 4 x 312, batch 8 x 128 on a CPU
    python benchmarks/step.py --student 6x768 --padding 0.5

Random weights and tokens (neither changes the cost). Variants take turns within a round (A B C … A B C …) in one
process; the table has medians and ratios of the rounds. Peak memory comes from a process of its own for each variant:
the highest resident (on a GPU: allocated) memory of three steps above that of the imported libraries."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

os.environ.setdefault("DS_LOG_LEVEL", "error")

import torch
import torch.nn.functional as F
from measuring import base_memory, header, in_a_fresh_process, machine, peak_above
from torch import nn
from transformers import AttentionInterface, BertConfig, BertModel

from engine.config.deepspeed import resolve_execution
from engine.config.deepspeed_file import FOLDER
from engine.config.distill import KernelConfig, LossConfig, MappingConfig, OptimConfig, TrainConfig
from engine.data.batch import Batch, Counts
from engine.jobs.distill.module import DistilModule
from engine.jobs.execution import attention_backend
from engine.jobs.measure.turns import synchronise, take_turns
from engine.kernels.choice import choose_kernels
from engine.losses.loss_set import LossSet
from engine.mapping import LayerMapping
from engine.models.hub import shape_of
from engine.models.install import install, runs_unpadded
from engine.models.projections import Projections
from engine.models.student import new_model
from engine.models.teacher import FrozenTeacher, truncated_config
from engine.ranks.runtime import join_ranks
from engine.train.deepspeed_engine import DeepSpeedModel
from engine.train.optim import ChosenOptimizer, build_optimizer, parameter_groups

TEACHER = BertConfig(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
STUDENTS = {
    "4x312": (LayerMapping((0, 5, 0, 10), 12), 312, 1200),
    "6x768": (LayerMapping((0, 4, 0, 7, 0, 10), 12), 768, 3072),
    "3x384": (LayerMapping((0, 5, 10), 12), 384, 1536),
}
"""Name -> mapping, width, feed-forward width; 12 heads like the teacher."""
LR = 1e-4

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One variant of our step."""

    name: str
    backend: str = "torch"
    attention: str = "sdpa"
    """of the student; auto: from the table"""
    truncate: bool = True
    fused_optimizer: bool = True
    teacher: str = "float32"
    student: str = "float32"
    unpadded: bool = True
    zero_stage: int = 0


LEVERS = [
    Setting(
        "Q and K captured, no score maps", backend="reference", truncate=False, fused_optimizer=False, unpadded=False
    ),
    Setting("+ loss kernels", truncate=False, fused_optimizer=False, unpadded=False),
    Setting("+ teacher stops at its deepest mapped layer", fused_optimizer=False, unpadded=False),
    Setting("+ fused optimizer", unpadded=False),
    Setting("+ no work on pads"),
    Setting("+ teacher in bf16", teacher="bfloat16"),
    Setting("+ student in bf16", teacher="bfloat16", student="bfloat16"),
    Setting("+ attention from the measured table", teacher="bfloat16", student="bfloat16", attention="auto"),
]


def student_config(name: str) -> BertConfig:
    mapping, width, inner = STUDENTS[name]
    return BertConfig(
        num_hidden_layers=mapping.student_layers,
        hidden_size=width,
        intermediate_size=inner,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )


def make_batch(
    sequences: int, length: int, padding: float, device: torch.device, *, seed: int = 0, vocabulary: int = 30000
) -> Batch:
    """padding: share of positions; lengths are spread evenly around the mean, the longest is `length`."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, vocabulary, (sequences, length), generator=make)
    lengths = [length] * sequences
    if padding:
        spread = torch.linspace(1.0 - 2 * padding, 1.0, sequences).clamp(min=0.05)
        lengths = [max(4, round(length * float(share))) for share in spread]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    counts = Counts.from_lengths(torch.tensor(lengths).numpy())
    batch = Batch(ids, mask if padding else None, None, counts, lengths=tuple(lengths))
    return batch.to(device)


# ---------------------------------------------------------------------------------------------------- the naive step


def keep_scores(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any):
    """Eager attention that leaves its scores where TinyBERT's model returns them."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores + mask
    module.scores = scores
    return torch.matmul(F.softmax(scores, dim=-1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register("benchmark_scores", keep_scores)


def naive_step(student_name: str, batch: Batch, device: torch.device, *, frozen: bool) -> Step:
    mapping, width, _ = STUDENTS[student_name]
    torch.manual_seed(0)
    models = []
    for config in (copy.deepcopy(TEACHER), student_config(student_name)):
        model = BertModel(config, add_pooling_layer=False).to(device)
        model.set_attn_implementation("benchmark_scores")
        models.append(model)
    teacher, student = models
    project = nn.Linear(width, TEACHER.hidden_size, bias=False).to(device)
    if frozen:
        teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=LR)
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    additive = ((1 - real) * -10000.0)[:, None, None, :].to(torch.float32)
    tokens = real.sum()
    shape = (*batch.input_ids.shape, 1)

    def forward(model: BertModel) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        output = model(batch.input_ids, attention_mask=additive, output_hidden_states=True)
        return output.hidden_states, [layer.attention.self.scores for layer in model.encoder.layer]

    def step() -> None:
        if frozen:
            with torch.no_grad():
                states_t, maps_t = forward(teacher)
        else:
            states_t, maps_t = forward(teacher)
        states_s, maps_s = forward(student)
        both = real[:, None, None, :] * real[:, None, :, None]
        loss = torch.zeros((), device=device)
        for m, g in [(0, 0), *mapping.pairs]:
            gap = (project(states_s[m]) - states_t[g].detach()) * real.view(shape)
            loss = loss + gap.square().sum() / (tokens * TEACHER.hidden_size)
        for m, g in mapping.pairs:
            gap = (maps_s[m - 1] - maps_t[g - 1].detach()) * both
            loss = loss + gap.square().sum() / (TEACHER.num_attention_heads * (real.sum(1) ** 2).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------------------------------------- our step


@dataclass(frozen=True)
class Ours:
    """What a setting makes of our engine."""

    setting: Setting
    student: str
    length: int
    sequences: int
    device: torch.device
    vocabulary: int = TEACHER.vocab_size
    """Of the student: proxies have only the tokens that they meet."""

    @property
    def losses(self) -> LossSet:
        mapping, _, _ = STUDENTS[self.student]
        student, teacher = shape_of(student_config(self.student), False), shape_of(TEACHER, False)
        kernels = KernelConfig(backend=self.setting.backend)
        return LossSet(
            LossConfig(),
            MappingConfig(hidden=str(mapping)),
            hidden_map=mapping,
            attention_map=mapping,
            student=student,
            teacher=teacher,
            mlm_probability=0.0,
            kernels=choose_kernels(kernels, device=self.device, seq_len=self.length, tinybert=False),
        )

    def teacher(self) -> FrozenTeacher:
        wanted = self.losses.wanted_teacher
        if not self.setting.truncate:
            wanted = replace(wanted, hidden=wanted.hidden | {12})
        kind, shape = self.setting.teacher, shape_of(TEACHER, False)
        with default_dtype(getattr(torch, kind)):
            config = truncated_config(copy.deepcopy(TEACHER), wanted.deepest)
            config.max_position_embeddings = max(config.max_position_embeddings, self.length)
            model = BertModel(config, add_pooling_layer=False)
        install(model, attention_backend("auto", kind, shape, self.length, key="teacher.attention").name)
        settings = {"wanted": wanted, "full_config": TEACHER, "device": self.device}
        return FrozenTeacher(model, **settings, unpadded=self.setting.unpadded)

    def model(self) -> DeepSpeedModel:
        """DeepSpeed's, around a new student."""
        setting, losses = self.setting, self.losses
        config = student_config(self.student)
        config.vocab_size = self.vocabulary
        config.max_position_embeddings = max(config.max_position_embeddings, self.length)
        shape = shape_of(config, False)
        student = new_model(config, False, 0)
        install(
            student,
            attention_backend(setting.attention, setting.student, shape, self.length, key="student.attention").name,
        )
        projections = Projections(
            LossConfig(), student_width=shape.width, teacher_width=768, layers=losses.projected_layers
        )
        unpadded = setting.unpadded and runs_unpadded(student)
        module = DistilModule(student.train(), projections, losses, unpadded=unpadded).to(self.device)
        train = TrainConfig(
            steps=1000, global_batch=self.sequences, lr=LR, warmup_steps=0, schedule="constant", grad_clip=0.0
        )
        file = f"zero{setting.zero_stage}_{'bf16' if setting.student == 'bfloat16' else 'fp32'}.json"
        execution = resolve_execution(train, OptimConfig(), FOLDER / file, int(os.environ.get("WORLD_SIZE", "1")))
        if setting.fused_optimizer:
            chosen = build_optimizer(OptimConfig(), module, lr=LR, execution=execution, device=self.device)
        else:
            plain = torch.optim.AdamW(parameter_groups(module, 0.01), lr=LR, foreach=False)
            chosen = ChosenOptimizer(plain, "plain", "")
        return DeepSpeedModel(module, chosen.optimizer, train, execution)


@contextmanager
def default_dtype(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def student_step(model: DeepSpeedModel, batch: Batch, features: Any, *, last_user: bool = False) -> None:
    total, _ = model(batch, features, batch.counts)
    if last_user:
        features.release()
    model.backward(total)
    model.step(norm=False, skip_bad=False)


def our_step(setting: Setting, student_name: str, batch: Batch, device: torch.device) -> Step:
    sequences, length = batch.input_ids.shape
    ours = Ours(setting, student_name, length, sequences, device)
    torch.manual_seed(0)
    teacher, model = ours.teacher(), ours.model()
    return lambda: student_step(model, batch, teacher(batch), last_user=True)


# ---------------------------------------------------------------------------------------------------- the limit


def product_rate(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device, batches: int = 1) -> float:
    """FLOP/s of (batches, n, k) x (batches, k, m), the best of some."""
    a, b = (torch.randn(batches, *shape, device=device).to(dtype) for shape in ((n, k), (k, m)))
    best = float("inf")
    for _ in range(12):
        synchronise(device)
        began = time.perf_counter()
        torch.bmm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * batches * n * k * m / best


def limit(student_name: str, batch: Batch, device: torch.device, *, teacher: str, student: str) -> dict[str, float]:
    """Seconds by part: FLOPs at the rate of matrix products of their shapes. Nothing else costs anything."""
    mapping, width, inner = STUDENTS[student_name]
    tokens, length = int(batch.counts.tokens), batch.input_ids.shape[1]
    pairs, deepest = mapping.pairs, max(mapping.genes)
    sequences = max(1, round(tokens / length))

    def linear(d: int, f: int, dtype: str) -> float:
        """Seconds of one layer's linear maps over all tokens."""
        kind = getattr(torch, dtype)
        shapes = [(d, d, 4), (d, f, 1), (f, d, 1)]
        return sum(2.0 * tokens * k * m * n / product_rate(tokens, k, m, kind, device) for k, m, n in shapes)

    def attention(d: int, dtype: str) -> float:
        rate = product_rate(length, d // 12, length, getattr(torch, dtype), device, batches=sequences * 12)
        return 4.0 * batch.counts.token_pairs * d / rate

    def backward(d: int, f: int, dtype: str) -> float:
        kind = getattr(torch, dtype)
        shapes = [(d, d, 4), (d, f, 1), (f, d, 1)]

        def seconds_a_flop(k: int, m: int) -> float:
            of_inputs, of_weights = product_rate(tokens, m, k, kind, device), product_rate(k, tokens, m, kind, device)
            return 1 / of_inputs + 1 / of_weights

        return sum(2.0 * tokens * k * m * n * seconds_a_flop(k, m) for k, m, n in shapes)

    d_t, f_t, layers = TEACHER.hidden_size, TEACHER.intermediate_size, mapping.student_layers
    kind = getattr(torch, student)
    hidden = 3 * 2.0 * tokens * width * d_t * (len(pairs) + 1) / product_rate(tokens, width, d_t, kind, device)
    heads = 12
    rate = product_rate(length, (width + d_t) // heads, length, torch.float32, device, batches=sequences * heads)
    scores = 2.0 * batch.counts.token_pairs * (width + d_t + 2 * width) * len(pairs) / rate
    return {
        "teacher": deepest * (linear(d_t, f_t, teacher) + attention(d_t, teacher)),
        "student forward": layers * (linear(width, inner, student) + attention(width, student)),
        "student backward": layers * (backward(width, inner, student) + 2 * attention(width, student)),
        "hidden loss": hidden,
        "attention loss": scores,
    }


# ---------------------------------------------------------------------------------------------------- measuring


def variants(precisions: list[str], padding: float) -> list[Setting | str]:
    found: list[Setting | str] = ["naive", "naive, teacher frozen"]
    before: Setting | None = None
    for lever in LEVERS:
        if (not padding and lever.name == "+ no work on pads") or lever.student not in precisions:
            continue
        before = lever
        found.append(lever)
    assert before is not None
    return found


def build(which: Setting | str, student: str, batch: Batch, device: torch.device) -> Step:
    if isinstance(which, str):
        return naive_step(student, batch, device, frozen=which != "naive")
    return our_step(which, student, batch, device)


def peak_memory(number: int, args: argparse.Namespace, device: torch.device) -> float:
    """MiB of one variant in this process, above what libraries and the batch take."""
    batch = make_batch(args.batch, args.length, args.padding, device)
    base = base_memory(device)
    step = build(variants(args.precision, args.padding)[number], args.student, batch, device)

    def steps() -> None:
        for _ in range(3):
            step()

    return peak_above(base, steps, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--student", choices=STUDENTS, default="4x312")
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--padding", type=float, default=0.0, help="share of positions that are pads")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], help="of the student")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="unset: all cores")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    outside = dict(os.environ)  # without the address at which this process meets itself
    runtime = join_ranks(0)
    device = runtime.device
    if args.memory is not None:
        print(json.dumps(peak_memory(args.memory, args, device)))
        return
    batch = make_batch(args.batch, args.length, args.padding, device)
    chosen = variants(args.precision, args.padding)
    names = [which if isinstance(which, str) else which.name for which in chosen]
    steps = {name: build(which, args.student, batch, device) for name, which in zip(names, chosen, strict=True)}
    times = take_turns(steps, args.rounds, device)
    steps.clear()
    gc.collect()
    tokens = batch.counts.tokens
    print(machine(device, ["transformers", "deepspeed"]))
    print(
        f"12 x 768 to {args.student}, {STUDENTS[args.student][0]}, batch {args.batch} x {args.length}, "
        f"{args.padding:.0%} pads ({tokens:,.0f} real tokens), {args.rounds} rounds\n"
    )
    columns = ("step", "ms", "tokens/s", "CPU s", "peak MiB", "times naive", "times frozen (min to max)")
    print(header(*columns))
    for number, name in enumerate(names):
        took = times[name]
        peak = in_a_fresh_process(*sys.argv[1:], "--memory", str(number), env=outside)
        print(
            f"| {name} | {took.ms:.0f} | {1000 * tokens / took.ms:,.0f} | {median(took.cpu):.2f} | {peak:,.0f} | "
            f"{took.ratio_to(times[names[0]]).split()[0]} | {took.ratio_to(times[names[1]])} |",
            flush=True,
        )
    print()
    ours = [which for which in chosen if isinstance(which, Setting)]
    last = {(which.teacher, which.student): which for which in ours}  # of each combination the one with all levers
    for (of_teacher, of_student), lever in last.items():
        parts = limit(args.student, batch, device, teacher=of_teacher, student=of_student)
        least, took_ms = 1000 * sum(parts.values()), times[lever.name].ms
        listed = ", ".join(f"{part} {1000 * seconds:.0f}" for part, seconds in parts.items())
        print(
            f"Limit with a {of_teacher} teacher and a {of_student} student: {least:.0f} ms ({listed}); "
            f'"{lever.name}" reaches {least / took_ms:.0%}.'
        )


if __name__ == "__main__":
    main()
