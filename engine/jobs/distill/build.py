"""The parts of a distillation, made from its plan: corpus, teacher, trained module with its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from engine.data.loader import CorpusLoader
from engine.data.shard_check import ShardCheck, share_of_this_host
from engine.data.share import StepShare
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import Plan
from engine.models.compact_embedding import keep_tokens
from engine.models.features import Wanted
from engine.models.install import runs_unpadded
from engine.models.projections import Projections
from engine.models.shape import forward_flops_per_token
from engine.models.student import build_student
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import launcher_rank, uses_gpu
from engine.train.deepspeed_engine import shard_frozen
from engine.train.optim import ChosenOptimizer, choose_optimizer


class TeacherCost(Protocol):
    """A teacher, as far as its cost is concerned."""

    def flops_per_token(self, seq_len: int, *, head_share: float = 1.0) -> float:
        """Returns the FLOPs of its forward pass for a token; head_share: share of tokens that its head is run on."""
        ...


def open_corpus(plan: Plan, check: ShardCheck | None = None) -> CorpusLoader:
    """Returns this rank's loader. check: that of another loader of the same corpus; one of its own is started
    otherwise. Raises UserError for a corpus that is damaged or too small."""
    config = plan.config
    folder = Path(config.data.path)
    if check is None and config.data.verify:
        part, parts = share_of_this_host()
        check = ShardCheck(folder, plan.manifest, part=part, parts=parts)
        check.settle()
    return CorpusLoader(
        folder,
        StepShare(
            config.train.global_batch,
            plan.execution.micro_batch_size,
            rank=launcher_rank(),
            world=plan.execution.world_size,
        ),
        manifest=plan.manifest,
        check=check,
        seq_len=plan.seq_len,
        eval_sequences=config.data.eval_sequences,
        seed=config.seed,
        group_by_length=config.data.group_by_length,
        mlm_probability=config.data.mlm_probability,
        whole_word=config.data.whole_word_mask,
        tokenizer=plan.tokenizer,
        pin_memory=uses_gpu(),
        windows=plan.losses.windows,
    )


def load_teacher(plan: Plan, wanted: Wanted, device: torch.device) -> FrozenTeacher:
    """Loads as much of the teacher as is wanted, and places it (teacher.placement). Collective under zero3."""
    cfg = plan.config.teacher
    return FrozenTeacher.load(
        plan.teacher,
        wanted=wanted,
        dtype=getattr(torch, plan.teacher_dtype),
        device=device,
        backend=plan.teacher_attention.name,
        shard=shard_frozen if cfg.placement == "zero3" else None,
        unpadded=plan.unpadded,
    )


def initial_student(plan: Plan, *, with_mlm_head: bool) -> PreTrainedModel:
    """Returns the student on the CPU, in fp32. Its weights depend on the plan's configuration and seed alone."""
    config = plan.config
    torch.manual_seed(config.seed)
    return build_student(
        config.student,
        plan.teacher,
        plan.given_student,
        hidden_map=plan.hidden_map,
        with_mlm_head=with_mlm_head,
        seed=config.seed,
        backend=plan.student_attention.name,
    )


def build_module(
    plan: Plan, device: torch.device, *, tokens: torch.Tensor | None = None
) -> tuple[DistilModule, ChosenOptimizer]:
    """Returns student and projections with their initial weights, which depend on the plan's configuration and seed
    alone, and their optimizer. Raises UserError when `require_fused` is broken.

    tokens: ids that the student can meet, each once; it then has no other embeddings, where that changes nothing else.
    """
    config = plan.config
    student = initial_student(plan, with_mlm_head=plan.mlm_head)
    unpadded = plan.unpadded and runs_unpadded(student)  # it tries ids that may not be kept
    # a head scores every token, and LAMB looks at the norm of the whole matrix
    if tokens is not None and not plan.mlm_head and "lamb" not in config.optim.name:
        keep_tokens(student, tokens)
    torch.manual_seed(config.seed + 1)  # the projections do not depend on how the student was initialised
    projections = Projections(
        config.loss,
        same_space=plan.same_space,
        student_width=plan.student_shape.width,
        teacher_width=plan.teacher_shape.width,
        layers=plan.losses.projected_layers,
    )
    if plan.trained_projections is not None:
        projections.take(load_file(plan.trained_projections))
    module = DistilModule(student, projections, plan.losses, unpadded=unpadded)
    optimizer = choose_optimizer(
        module, config.optim, config.train, plan.execution, device, require_fused=config.require_fused
    )
    return module, optimizer


def flops_per_token(plan: Plan, teacher: TeacherCost, module: DistilModule, *, share_of_teacher: float = 1.0) -> float:
    """Returns the FLOPs of training for a token as TFLOPS_NOTE of engine/train/monitor.py defines them; an MLM head
    counts for the tokens that go through it.

    share_of_teacher: 1 / the number of students that one teacher pass serves. Call it before ZeRO-3 shards the weights.
    """
    head_share = plan.config.data.mlm_probability or 1.0
    student = forward_flops_per_token(module.student, plan.student_shape, plan.seq_len, head_share=head_share)
    used = len(plan.losses.projected_layers) if plan.projection != "identity" else 0
    projections = 2.0 * used * plan.student_shape.width * plan.teacher_shape.width
    forward = teacher.flops_per_token(plan.seq_len, head_share=head_share)
    return share_of_teacher * forward + 3.0 * (student + projections)
