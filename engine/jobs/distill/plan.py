"""What a run will do, worked out and checked from configuration files alone, before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from engine.config.deepspeed import Execution
from engine.config.distill import LossConfig, MappingConfig, RunConfig, StudentConfig
from engine.config.marks import FIXED, settings
from engine.data.manifest import Manifest, corpus_hash, load_manifest
from engine.errors import UserError
from engine.hub.files import allow_pickle, require_whole
from engine.hub.sentence import SentenceEncoder
from engine.hub.tokenizer import load_tokenizer
from engine.jobs.execution import attention_backend, compute_device, hardware, plan_execution, versions
from engine.kernels.choice import Kernels, choose_kernels
from engine.losses import own
from engine.losses.base import NO_LOSSES, OwnLosses
from engine.losses.loss_set import LossSet
from engine.losses.pooled import FEWEST_TEXTS
from engine.losses.random_layers import build_losses
from engine.mapping import LayerMapping, MappingPair
from engine.models.apex import require_fused_layer_norm
from engine.models.attention import Backend
from engine.models.fit import Parts, check_fit
from engine.models.hub import SavedModel, model_hashes, shape_of
from engine.models.initialise import resolve_init
from engine.models.pooling import MEAN
from engine.models.projections import PROJECTIONS_FILE, linear_name
from engine.models.shape import ModelShape
from engine.models.student import build_student_config, pattern_layers, with_dropout
from engine.train.portable import base_model_of, licences_of, public_name, sentence_student


@dataclass(frozen=True)
class Plan:
    """Facts and choices of a run that are known before any model is loaded."""

    config: RunConfig
    execution: Execution
    manifest: Manifest
    tokenizer: PreTrainedTokenizerFast
    teacher: SavedModel
    given_student: SavedModel | None
    """Model that student.path names."""
    student_config: PretrainedConfig
    teacher_shape: ModelShape
    student_shape: ModelShape
    mapping: MappingPair
    own_losses: OwnLosses
    """Losses beside those of the configuration, with their weights."""
    losses: LossSet
    teacher_attention: Backend
    student_attention: Backend
    kernels: Kernels
    seq_len: int
    sentence: SentenceEncoder | None
    """What makes one vector of a text of the student's states, where the teacher is a sentence encoder."""
    warnings: tuple[str, ...]

    @property
    def pooling(self) -> tuple[str, ...]:
        """Ways in which the teacher makes one vector of a text"""
        return MEAN if self.sentence is None else self.sentence.pooling

    @property
    def hidden_map(self) -> LayerMapping:
        """Mapping of the losses of hidden states"""
        return self.mapping.hidden

    @property
    def attention_map(self) -> LayerMapping:
        """Mapping of the losses of attention"""
        return self.mapping.attention

    @property
    def teacher_dtype(self) -> str:
        """Type of the teacher's weights: float32, bfloat16 or float16"""
        return teacher_dtype(self.config, self.execution)

    @property
    def unpadded(self) -> bool:
        """Whether padded batches run without their pads, where a model can"""
        return self.config.kernels.unpadded and self.config.loss.preset != "tinybert"  # which counts pads

    @property
    def same_space(self) -> bool:
        """Whether the student's states start as the teacher's"""
        return starts_in_same_space(self.config.student, self.student_shape, self.teacher_shape)

    @property
    def projection(self) -> str:
        """Kind of map that joins the two widths (loss.projection)"""
        return self.config.loss.projection_kind(same_space=self.same_space)

    @property
    def pooled_layers(self) -> tuple[int, int] | None:
        """Last layers of student and teacher, whose vectors of a text loss.pooled compares; None where it is off"""
        return (self.student_shape.layers, self.teacher_shape.layers) if self.config.loss.pooled else None

    @property
    def vector_map(self) -> dict[str, Any] | None:
        """Projection that the student's vectors of a text are trained through, and the number of vectors side by side;
        None where there is none"""
        if not self.config.loss.pooled or self.projection == "identity":
            return None
        return {"projection": linear_name(self.projection, self.student_shape.layers), "ways": len(self.pooling)}

    @property
    def trained_projections(self) -> Path | None:
        """File of projections that an export, which student.path names, has beside its weights"""
        if self.given_student is None or self.projection == "identity":
            return None
        file = Path(self.given_student.path) / PROJECTIONS_FILE
        return file if file.exists() else None

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of all losses by their names"""
        return {**self.config.loss.active, **{kind.name: weight for kind, weight in self.own_losses.items()}}

    @property
    def mlm_head(self) -> bool:
        """Whether the student has a head that predicts tokens"""
        return self.losses.wanted_student.logits


def starts_in_same_space(student: StudentConfig, shape: ModelShape, teacher: ModelShape) -> bool:
    """Returns whether a student's states start as the teacher's: of one width, made by copied layers."""
    copied = student.path is None and (student.init or "random") != "random"
    return copied and shape.width == teacher.width


def make_plan(config: RunConfig, own_losses: OwnLosses = NO_LOSSES) -> Plan:
    """Reads configuration files, manifest and tokenizer, and checks them against each other. Raises UserError."""
    own.check_own_losses(own_losses)
    allow_pickle(config.allow_pickle)
    execution = plan_execution(config.deepspeed_config, config.train, config.optim)
    if config.checkpoint.storage == "local":
        execution.resolved.setdefault("checkpoint", {})["use_node_local_storage"] = True
    if config.student.fused_layer_norm:
        require_fused_layer_norm()
    teacher = SavedModel.read("teacher.path", config.teacher.path)
    given = None if config.student.path is None else SavedModel.read("student.path", config.student.path)
    tokenizer = load_tokenizer(config.teacher.path, key="teacher.path")
    manifest = _read_manifest(config)
    notes = check_fit(_parts(config, tokenizer, manifest, teacher, given))
    if given is None:
        student_config = build_student_config(config.student, teacher.config)
    else:
        student_config = with_dropout(given.config, config.student.dropout)
    teacher_shape = shape_of(teacher.config, teacher.has_mlm_head)
    student_shape = shape_of(student_config, has_mlm_head=config.loss.logits > 0 or config.loss.mlm > 0)
    dtype, seq_len = teacher_dtype(config, execution), manifest.seq_len
    kernels = choose_kernels(
        config.kernels,
        device=compute_device(),
        seq_len=seq_len,
        tinybert=config.loss.preset == "tinybert",
        precisions=(execution.precision, dtype),
    )
    mapping = MappingPair.from_texts(
        config.mapping.hidden,
        config.mapping.attention,
        student_layers=student_shape.layers,
        teacher_layers=teacher_shape.layers,
    )
    kind = config.loss.projection_kind(same_space=starts_in_same_space(config.student, student_shape, teacher_shape))
    through_map = config.loss.pooled > 0 and kind != "identity"
    map_bias = config.loss.resolved_projection_bias if through_map else None
    sentence, sentence_notes = sentence_student(config.teacher.path, tokenizer, student_config, map_bias)
    pooling = MEAN if sentence is None else sentence.pooling
    losses = mapped_losses(config, mapping, student_shape, teacher_shape, kernels, own_losses, pooling)
    check_similarity(config.loss, execution)
    plan = Plan(
        config=config,
        execution=execution,
        manifest=manifest,
        tokenizer=tokenizer,
        teacher=teacher,
        given_student=given,
        student_config=student_config,
        teacher_shape=teacher_shape,
        student_shape=student_shape,
        mapping=mapping,
        own_losses=own_losses,
        losses=losses,
        kernels=kernels,
        teacher_attention=attention_backend(
            config.teacher.attention, dtype, teacher_shape, seq_len, key="teacher.attention"
        ),
        student_attention=attention_backend(
            config.student.attention, execution.precision, student_shape, seq_len, key="student.attention"
        ),
        seq_len=seq_len,
        sentence=sentence,
        warnings=(
            *notes,
            *sentence_notes,
            *losses.warnings,
            *idle_settings(config, losses, student_shape, execution.world_size),
        ),
    )
    if plan.trained_projections is not None:
        require_whole(plan.trained_projections, "student.path")
    return plan


def check_similarity(loss: LossConfig, execution: Execution) -> None:
    """Raises UserError where loss.pooled compares the texts of a micro batch that has too few of them."""
    texts = execution.micro_batch_size * execution.world_size
    if loss.pooled and loss.pooled_weights[-1] and texts < FEWEST_TEXTS:
        raise UserError(
            f"loss.pooled_weights={loss.pooled_weights}: similarity compares the texts of a micro batch over all "
            f"ranks, at least {FEWEST_TEXTS}, but there {'is 1' if texts == 1 else f'are {texts}'}: raise "
            "train.global_batch or train_micro_batch_size_per_gpu in the DeepSpeed file, or set its weight (the last "
            "one) to 0"
        )


def _read_manifest(config: RunConfig) -> Manifest:
    manifest = load_manifest(Path(config.data.path))
    if config.data.seq_len not in (None, manifest.seq_len):
        raise UserError(
            f"data.seq_len={config.data.seq_len}, but {config.data.path} was prepared with {manifest.seq_len}; remove "
            "the key or prepare the corpus again"
        )
    return manifest


def _parts(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    manifest: Manifest,
    teacher: SavedModel,
    given: SavedModel | None,
) -> Parts:
    models = (teacher,) if given is None else (teacher, given)
    length_of = f"data.path={config.data.path!r} has sequences of {manifest.seq_len} tokens"
    return Parts(tokenizer, models, manifest, manifest.seq_len, length_of)


def mapped_losses(
    config: RunConfig,
    mapping: MappingPair,
    student: ModelShape,
    teacher: ModelShape,
    kernels: Kernels,
    own_losses: OwnLosses,
    pooling: tuple[str, ...],
) -> LossSet:
    """Builds the losses over `mapping`, which is that of `config`. Raises UserError for what does not fit the two
    models."""
    if config.student.path is None:
        sources = resolve_init(config.student.init or "random", student.layers, teacher.layers, mapping.hidden)
        same = pattern_layers(sources, teacher.layers)
        student = replace(student, windows=tuple(teacher.window(layer) for layer in same))
    return build_losses(
        config.loss,
        config.mapping,
        mapping,
        seed=config.seed,
        student=student,
        teacher=teacher,
        mlm_probability=config.data.mlm_probability,
        kernels=kernels,
        own_losses=own_losses,
        pooling=pooling,
    )


def with_mapping(plan: Plan, mapping: MappingPair) -> Plan:
    """Returns the same plan with other layers mapped, each with weight 1, and kept. Raises UserError."""
    attention = str(mapping.attention) if mapping.separate else None
    config = replace(
        plan.config,
        mapping=MappingConfig(hidden=str(mapping.hidden), attention=attention),
        student=starting_student(plan.config.student, mapping),
    )
    shapes = plan.student_shape, plan.teacher_shape
    losses = mapped_losses(config, mapping, *shapes, plan.kernels, plan.own_losses, plan.pooling)
    idle = idle_settings(config, losses, plan.student_shape, plan.execution.world_size)
    return replace(plan, config=config, mapping=mapping, losses=losses, warnings=(*losses.warnings, *idle))


def starting_student(student: StudentConfig, mapping: MappingPair) -> StudentConfig:
    """Returns the student that starts from the kept layers of `mapping`; without any it is as it was."""
    return student if mapping.kept is None else replace(student, init=mapping.kept)


def teacher_dtype(config: RunConfig, execution: Execution) -> str:
    """Returns the type of the teacher's weights: float32, bfloat16 or float16."""
    return execution.precision if config.teacher.dtype == "auto" else config.teacher.dtype


def idle_settings(config: RunConfig, losses: LossSet, student: ModelShape, world_size: int) -> list[str]:
    """Returns a sentence for each setting that has no effect in this combination."""
    idle = []
    if config.data.whole_word_mask and not config.data.mlm_probability:
        idle.append("data.whole_word_mask has no effect while data.mlm_probability is 0")
    if config.train.eval_every and not config.data.eval_sequences:
        idle.append("train.eval_every has no effect while data.eval_sequences is 0")
    if config.teacher.placement == "zero3" and world_size == 1:
        idle.append("teacher.placement='zero3' shards nothing on a single rank, and costs time; use replicate")
    wanted = losses.wanted_student
    if not wanted.logits and wanted.deepest < student.layers:
        beyond = f"{wanted.deepest + 1}" + (f" to {student.layers}" if wanted.deepest + 1 < student.layers else "")
        idle.append(f"student layer {beyond} gets no gradient: no loss reaches beyond student layer {wanted.deepest}")
    return idle


def identity(plan: Plan) -> dict[str, Any]:
    """Returns what must be the same when a run is continued: every setting that decides what is computed, and hashes of
    its inputs."""
    return settings(plan.config, *FIXED) | {
        "loss.projection": plan.projection,
        "train.warmup_steps": plan.config.train.resolved_warmup_steps,
        **model_hashes("teacher", plan.teacher),
        "data.content_sha256": corpus_hash(plan.manifest),
        "mapping.hidden_resolved": str(plan.hidden_map),
        "mapping.attention_resolved": str(plan.attention_map),
        **own.identity_of(plan.own_losses),
    }


def hyperparameters(plan: Plan) -> dict[str, float | str]:
    """Returns the row of a run on TensorBoard's HPARAMS page."""
    config, shape = plan.config, plan.student_shape
    return {
        "teacher": public_name(config.teacher.path),
        "student": f"{shape.layers} x {shape.width}",
        "mapping": str(plan.mapping),
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in config.loss.active.items()),
        "lr": config.train.lr,
        "batch": config.train.global_batch,
        "steps": config.train.steps,
        "seed": config.seed,
    }


def describe_for_export(plan: Plan, student_config: PretrainedConfig) -> dict[str, Any]:
    """Returns what a checkpoint tells launch/export.py: the student's configuration, and the facts of its model
    card."""
    config, shape = plan.config, plan.student_shape
    licences = licences_of(config.teacher.path)
    started_from = config.student.init or "random" if config.student.path is None else public_name(config.student.path)
    return {
        "student_config": student_config.to_dict(),
        "head": "mlm" if plan.mlm_head else "none",
        "vectors": plan.vector_map,
        "base_model": base_model_of(config.teacher.path),
        "licences": licences,
        "card": {
            "teacher": public_name(config.teacher.path),
            "licence of the teacher": ", ".join(licences) or "not named in its card",
            "student": f"{shape.layers} layers x {shape.width}, {shape.heads} heads",
            "initialised from": started_from,
            "hidden-state mapping": str(plan.hidden_map),
            "attention mapping": str(plan.attention_map),
            **({} if plan.sentence is None else {"vector of a text": str(plan.sentence)}),
            "losses": ", ".join(f"{name} x {weight:g}" for name, weight in plan.loss_weights.items()),
            "data": f"{public_name(config.data.path)}, {plan.manifest.sequences:,} sequences of {plan.seq_len} tokens",
            "planned steps": f"{config.train.steps} x {config.train.global_batch} sequences",
            "seed": config.seed,
            "hardware": hardware(plan.execution),
            "libraries": versions(),
        },
    }
