"""How much memory a run will need, worked out from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.deepspeed import Execution
from engine.config.distill import ATTENTION_MAPPED
from engine.jobs.distill.plan import Plan
from engine.models.teacher import FrozenTeacher

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank."""

    teacher: float
    student_states: float
    activations: float
    captured: float
    loss_maps: float
    host_states: float
    """Bytes moved to host memory by offload (0 otherwise)."""

    def on_gpu(self) -> str:
        """Returns the device memory of a rank in words, for the banner."""
        host = f", and {self.host_states / GIB:.2f} in host memory" if self.host_states else ""
        parts = {"teacher": self.teacher, "student's weights, gradients and optimizer": self.student_states}
        parts |= self._of_a_step
        return f"about {sum(parts.values()) / GIB:.2f} GiB per rank plus allocator slack: {_listed(parts)}{host}"

    def in_process(self, *, resident: float, parameters: int) -> str:
        """Returns the resident memory of a rank's process in words, for the banner of a run on a CPU.

        resident: bytes that it has now, libraries, teacher and the `parameters` that are trained, in fp32, among them.
        """
        states = self.student_states + self.host_states - parameters * BYTES["float32"]
        parts = {"now": resident, "student's gradients and optimizer": max(states, 0.0)} | self._of_a_step
        return f"about {sum(parts.values()) / GIB:.2f} GiB for each rank's process: {_listed(parts)}"

    @property
    def _of_a_step(self) -> dict[str, float]:
        return {
            "its activations": self.activations,
            "captured tensors": self.captured,
            "attention maps of the losses": self.loss_maps,
        }


def _listed(parts: Mapping[str, float]) -> str:
    """Returns the parts that are not 0.00 GiB."""
    return ", ".join(f"{name} {text}" for name, value in parts.items() if (text := f"{value / GIB:.2f}") != "0.00")


def estimate_memory(plan: Plan, teacher: FrozenTeacher, parameters: int) -> MemoryEstimate:
    """Returns what a rank will need. parameters: number of those that are trained."""
    execution, wanted = plan.execution, plan.losses.wanted_teacher
    tokens = execution.micro_batch_size * plan.seq_len
    kept = 1 / execution.world_size if plan.config.teacher.placement == "zero3" else 1.0
    captured = len(wanted.hidden) + len(wanted.attention) * (3 if wanted.values else 2)
    states, host_states = state_bytes(parameters, execution)
    return MemoryEstimate(
        teacher=teacher.parameters_count * BYTES[plan.teacher_dtype] * kept,
        student_states=states,
        activations=_activation_bytes(plan, tokens),
        captured=float(captured) * tokens * plan.teacher_shape.width * BYTES[plan.teacher_dtype],
        loss_maps=_loss_map_bytes(plan, tokens),
        host_states=host_states,
    )


def state_bytes(parameters: int, execution: Execution) -> tuple[float, float]:
    """Returns the bytes of weights, gradients and optimizer of a rank on its device, and those in host memory, by ZeRO
    stage (Rajbhandari et al. 2020, arXiv 1910.02054, figure 1: 2 + 2 + 12 bytes a parameter in 16 bits)."""
    width = BYTES[execution.precision]
    shares = [1 / execution.world_size if execution.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    optimizer = float(parameters) * (8 if execution.precision == "float32" else 12) * shares[0]
    gradients, weights = (float(parameters) * width * share for share in shares[1:])
    host = (optimizer if execution.offload_optimizer else 0.0) + (weights if execution.offload_param else 0.0)
    return weights + gradients + optimizer - host, host


def _activation_bytes(plan: Plan, tokens: int) -> float:
    """Returns what the student keeps for its backward pass, by Korthikanti et al. 2022 (arXiv 2205.05198, equation 2:
    34 bytes a token, unit of width and layer in 16 bits, plus 5 bytes per attention score when scores are kept)."""
    shape, double = plan.student_shape, BYTES[plan.execution.precision] / 2
    per_layer = tokens * shape.width * 34 * double
    if plan.student_attention.name in ("eager", "own"):
        per_layer += 5 * shape.heads * plan.seq_len * tokens * double
    if plan.config.student.activation_checkpointing:
        return per_layer * (1 + shape.layers / 17)  # each layer keeps its input only
    return per_layer * shape.layers


def _loss_map_bytes(plan: Plan, tokens: int) -> float:
    """Returns what the plain PyTorch losses of attention probabilities and relations keep: about 4.5 fp32 maps (H, L,
    L) of each term for their backward pass (measured: 165 MB for 3 terms of 16 x 12 x 128 x 128); attention scores keep
    none."""
    if plan.kernels.backend != "reference":
        return 0.0
    terms = sum(name.partition("/")[0] in ATTENTION_MAPPED for name in plan.losses.term_names)
    return terms * 4.5 * 4 * plan.student_shape.heads * plan.seq_len * tokens
