"""The start-up banner: what will be computed, on what, and an honest word on what is slower than it could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.deepspeed import Execution
from engine.config.distill import ATTENTION_MAPPED
from engine.jobs.distill.plan import Plan
from engine.jobs.execution import compute_device, versions
from engine.losses.measure import Measured
from engine.mapping import mapping_table
from engine.models.capture import FULL_FROM
from engine.models.shape import ModelShape
from engine.models.teacher import FrozenTeacher
from engine.records.columns import labelled_lines

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank."""

    teacher: float
    student_states: float
    activations: float
    captured: float
    loss_maps: float
    host_states: float
    """Moved to host memory by offload (0 otherwise)."""

    def __str__(self) -> str:
        gib = 2**30
        host = f", and {self.host_states / gib:.2f} in host memory" if self.host_states else ""
        parts = {
            "teacher": self.teacher,
            "student weights, gradients and optimizer": self.student_states,
            "its activations": self.activations,
            "captured tensors": self.captured,
            "attention maps of the losses": self.loss_maps,
        }
        listed = ", ".join(f"{name} {value / gib:.2f}" for name, value in parts.items())
        total = sum(parts.values()) / gib
        return f"about {total:.2f} GiB per rank beside libraries and allocator slack: {listed}{host}"


def estimate_memory(
    *,
    student: ModelShape,
    student_parameters: int,
    student_attention: str,
    activation_checkpointing: bool,
    teacher: ModelShape,
    teacher_parameters: int,
    teacher_dtype: str,
    teacher_sharded: bool,
    captured_teacher_tensors: int,
    attention_terms: int,
    execution: Execution,
    seq_len: int,
) -> MemoryEstimate:
    """Weights, gradients and optimizer by ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1: 2 + 2 + 12
    bytes a parameter in 16 bits); activations by Korthikanti et al. 2022 (arXiv 2205.05198, equation 2: 34 bytes a
    token, unit of width and layer in 16 bits, plus 5 bytes per attention score when scores are kept); both double in
    fp32. The plain PyTorch losses of attention probabilities and relations keep about 4.5 fp32 maps (H, L, L) of each
    term for their backward pass (measured: 165 MB for 3 terms of 16 x 12 x 128 x 128); attention scores keep none.
    """
    e, p = execution, float(student_parameters)
    wide = BYTES[e.precision] / 2
    shares = [1 / e.world_size if e.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    optimizer = p * (8 if e.precision == "float32" else 12) * shares[0]
    gradients, weights = (p * BYTES[e.precision] * share for share in shares[1:])
    host = (optimizer if e.offload_optimizer else 0.0) + (weights if e.offload_param else 0.0)
    tokens = e.micro_batch_size * seq_len
    per_layer = tokens * student.width * 34 * wide
    if student_attention == "eager":
        per_layer += 5 * student.heads * seq_len * tokens * wide
    layers = 1 + student.layers / 17 if activation_checkpointing else student.layers  # each layer keeps its input only
    return MemoryEstimate(
        teacher=teacher_parameters * BYTES[teacher_dtype] * (1 / e.world_size if teacher_sharded else 1.0),
        student_states=weights + gradients + optimizer - host,
        activations=per_layer * layers,
        captured=float(captured_teacher_tensors) * tokens * teacher.width * BYTES[teacher_dtype],
        loss_maps=attention_terms * 4.5 * 4 * student.heads * seq_len * tokens,
        host_states=host,
    )


def describe_pads(plan: Plan, *, teacher: bool, student: bool) -> str:
    """teacher, student: whether they run without pads."""
    if not plan.unpadded:
        why = "which loss.preset=tinybert counts" if plan.config.kernels.unpadded else "as kernels.unpadded=false says"
        return f"every batch runs with its pads, {why}"
    able = [name for name, runs in (("teacher", teacher), ("student", student)) if runs]
    if not able:
        return "every batch runs with its pads: neither model was found to compute the same without them"
    who = "both models run" if len(able) == 2 else f"the {able[0]} runs (the other was not found to compute the same)"
    return f"{who} without pads in batches that are less than {FULL_FROM[compute_device().type]:.0%} full"


def describe_start(plan: Plan, measured: Measured | None) -> list[str]:
    """What the projections start as, and by what terms are divided."""
    loss, pairs = plan.config.loss, plan.losses.state_pairs
    if measured is None:
        return ["projections and scales as the checkpoint has them"]
    lines = []
    if pairs:
        kind = "fitted" if loss.fits_projections else "random"
        what = "the identity explains" if plan.projection == "identity" else f"{kind} projections explain"
        shares = ", ".join(f"{pair} {share:.1%}" for pair, share in measured.explained.items())
        of = f"{measured.tokens:,} tokens"
        of += f"; {measured.left_out:,} without finite states left out" if measured.left_out else ""
        shares = shares or "nothing, since no state is finite"
        lines.append(f"{what} of the teacher's variance at the start: {shares} ({of})")
    if measured.scales:
        names = ", ".join(dict.fromkeys(term.partition("/")[0] for term in measured.scales))
        lines.append(f"{names}: each term as a share of its target's variance")
    return lines


def start(
    plan: Plan,
    *,
    teacher: FrozenTeacher,
    student_parameters: int,
    projection_parameters: int,
    student_unpadded: bool,
    measured: Measured | None,
    optimizer: str,
    epoch_sequences: int,
    device: str,
    start: str,
) -> str:
    """The whole banner of one start."""
    cfg, ex, t, s = plan.config, plan.execution, plan.teacher_shape, plan.student_shape
    wanted = plan.losses.wanted_teacher
    memory = estimate_memory(
        student=s,
        student_parameters=student_parameters + projection_parameters,
        student_attention=plan.student_attention.name,
        activation_checkpointing=cfg.student.activation_checkpointing,
        teacher=t,
        teacher_parameters=teacher.parameters_count,
        teacher_dtype=plan.teacher_dtype,
        teacher_sharded=cfg.teacher.placement == "zero3",
        captured_teacher_tensors=len(wanted.hidden) + len(wanted.attention) * (3 if wanted.values else 2),
        attention_terms=sum(name.partition("/")[0] in ATTENTION_MAPPED for name in plan.losses.term_names)
        if plan.kernels.backend == "reference"
        else 0,
        execution=ex,
        seq_len=plan.seq_len,
    )
    fewer = "" if teacher.layers_loaded == t.layers else f" ({teacher.layers_loaded} of them loaded and run)"
    origin = cfg.student.path or f"init {cfg.student.init or 'random'}"
    sequences = cfg.train.steps * cfg.train.global_batch
    rows: list[tuple[str, str | list[str]]] = [
        ("versions", versions()),
        (
            "teacher",
            [
                f"{cfg.teacher.path}: {plan.teacher.config.model_type}, {t.layers} layers{fewer}, width {t.width}, "
                f"{t.heads} heads, {teacher.parameters_count / 1e6:.1f} M parameters, {plan.teacher_dtype}, "
                f"{cfg.teacher.placement}",
                f"attention {plan.teacher_attention.name} ({plan.teacher_attention.reason})",
            ],
        ),
        (
            "student",
            [
                f"{origin}: {plan.student_config.model_type}, {s.layers} layers, width {s.width}, {s.heads} heads, "
                f"{student_parameters / 1e6:.1f} M parameters + {projection_parameters / 1e6:.2f} M in projections",
                f"attention {plan.student_attention.name} ({plan.student_attention.reason})",
            ],
        ),
        ("mapping", mapping_table(plan.hidden_map, plan.attention_map)),
        (
            "losses",
            [
                ", ".join(f"{name} {weight:g}" for name, weight in cfg.loss.active.items())
                + f"; preset {cfg.loss.preset}, projection {plan.projection}",
                *describe_start(plan, measured),
            ],
        ),
        (
            "corpus",
            f"{cfg.data.path}: {epoch_sequences:,} sequences an epoch, {plan.seq_len} tokens "
            f"({plan.manifest.fill:.0%} filled), {cfg.data.eval_sequences} held out",
        ),
        (
            "batch",
            f"{cfg.train.global_batch} sequences = {ex.micro_batch_size} micro batch x {ex.grad_accum_steps} "
            f"accumulation x {ex.world_size} ranks; {cfg.train.steps} steps = {sequences * plan.seq_len / 1e6:.2f} M "
            f"positions = {sequences / epoch_sequences:.2f} epochs",
        ),
        ("execution", f"{ex.precision}, ZeRO stage {ex.zero_stage} ({ex.source}), {device}"),
        ("optimizer", optimizer),
        ("kernels", [str(plan.kernels), describe_pads(plan, teacher=teacher.unpadded, student=student_unpadded)]),
        ("memory", str(memory)),
        ("start", start),
        ("output", cfg.output_dir),
    ]
    rows += [("warning", text) for text in plan.warnings]
    return labelled_lines(rows) + "\n"


def closing_table(
    first: dict[str, float], last: dict[str, float], facts: Sequence[tuple[str, str]], *, steps: tuple[int, int]
) -> str:
    """First and last logged value of each loss (at `steps`), then where everything is."""
    width = max(len(name) for name in [*first, "loss"]) + 2
    heads = [f"step {step}" for step in steps]
    lines = [f"{'loss':<{width}}{heads[0]:>12}{heads[1]:>12}{'ratio':>8}"]
    for name, value in first.items():
        ratio = f"{last[name] / value:.3f}" if value else "-"
        lines.append(f"{name:<{width}}{value:>12.4g}{last[name]:>12.4g}{ratio:>8}")
    return "\n".join([*lines, "", labelled_lines(facts)])
