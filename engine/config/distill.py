"""What a run computes: frozen dataclasses, the one home of every default and of its documentation.

How a machine executes it (precision, ZeRO stage, offload, micro batch) lives in one ds_configs JSON; see
engine/config/deepspeed.py. docs/configuration.md is generated from this file. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.checks import require
from engine.config.marks import PathText, evaluation, how, located, result
from engine.mapping import RANDOM_EACH_STEP, MappingPair
from engine.records.run_dir import is_tag, step_tag


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that the student imitates."""

    path: PathText = located("models/all-MiniLM-L6-v2", teacher=True)
    """Folder or hub name of the frozen teacher (any Auto-class encoder that uses transformers' attention interface,
    alone or in a model of sentence-transformers)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = result("auto", teacher=True)
    """Precision of the teacher's weights and forward; auto follows the student's (ds_configs)."""

    placement: Literal["replicate", "zero3"] = how("replicate")
    """replicate: a whole copy on each rank; zero3: weights sharded over the ranks, gathered layer by layer."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = how("auto", teacher=True)
    """Attention backend; auto picks by device, dtype, length and head width from a measured table."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained: its shape, and what it starts from."""

    path: PathText | None = result(None)
    """HF folder or hub name to start from; it then owns the architecture, and `layers` … `init` must stay unset."""

    layers: int | None = result(None)
    """Number of student layers M; unset: half of the teacher's."""

    hidden_size: int | None = result(None)
    """Width of the student's hidden states; unset: the teacher's."""

    heads: int | None = result(None)
    """Number of attention heads; unset: the teacher's (score and probability losses need the same number)."""

    intermediate_size: int | None = result(None)
    """Width of the feed-forward layer; unset: the teacher's, scaled by hidden_size."""

    init: str | None = result(None)
    """Where the initial weights come from: `random`; `mapping` (copy the mapped teacher layers, unmapped ones stay
    random); `uniform`, `every-other` (layers 2, 4, 6 …), `first`, `last`; or teacher layers like `0-3-7-11` (1-based,
    one per student layer, 0 = random; not the other mapping presets). Embeddings are copied too. A narrower student
    takes evenly spaced units of each width (Weight Selection, arXiv 2311.18823). Unset: random."""

    dropout: float = result(0.0)
    """Dropout probability of the student while it is distilled; the exported config keeps it."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = how("auto")
    """Attention backend; auto picks by device, dtype, length and head width from a measured table."""

    activation_checkpointing: bool = how(False)
    """Recompute each layer's activations in the backward pass: less memory, about a third more student compute."""

    fused_layer_norm: bool = how(False)
    """Replace LayerNorm by NVIDIA Apex's FusedLayerNorm; an error when Apex is not installed."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "heads", "intermediate_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"student.{name}", value, "must be at least 1")
        require(0.0 <= self.dropout < 1.0, "student.dropout", self.dropout, "must be in [0, 1)")
        if self.path is not None:
            for name in ("layers", "hidden_size", "heads", "intermediate_size", "init"):
                require(
                    getattr(self, name) is None,
                    f"student.{name}",
                    getattr(self, name),
                    f"remove it: student.path={self.path!r} already fixes the architecture and the weights",
                )

    def layer_count(self, teacher_layers: int) -> int:
        """Returns the number of layers of a student that is made from a teacher of that many."""
        return self.layers or max(1, teacher_layers // 2)


@dataclass(frozen=True, kw_only=True)
class MappingConfig:
    """Which layer of the teacher each layer of the student learns from."""

    hidden: str = result("uniform")
    """Layer mapping of the hidden-state losses: `0-5-0-10` (teacher layer of each student layer, 0 = none) or
    uniform, last, last-only, first, all-last, none, random:SEED; or random-each-step (RAIL-KD, arXiv 2109.10164): as
    many teacher layers as the student has, drawn anew at each step, in ascending order, for attention losses too."""

    attention: str | None = result(None)
    """Layer mapping of the attention losses (scores, probabilities, relations); unset: the same as `hidden`."""

    hidden_weights: list[float] | None = result(None)
    """One weight per student layer for the hidden-state losses; unset: 1 each."""

    attention_weights: list[float] | None = result(None)
    """One weight per student layer for the attention losses; unset: 1 each."""

    def __post_init__(self) -> None:
        for name in ("hidden_weights", "attention_weights"):
            for weight in getattr(self, name) or ():
                require(weight >= 0, f"mapping.{name}", getattr(self, name), "weights must be >= 0")
        require(
            self.attention is None or self.hidden != RANDOM_EACH_STEP,
            "mapping.attention",
            self.attention,
            f"remove it: mapping.hidden={RANDOM_EACH_STEP} draws the layers of attention losses too",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is compared between teacher and student, and how much each comparison counts."""

    preset: Literal["clean", "tinybert"] = result("clean")
    """clean: means over real tokens, averaged over active layers. tinybert: TinyBERT's released loss up to rounding
    (means over all positions, padding included; summed over layers; one projection with bias, for embeddings too)."""

    hidden: float = result(1.0)
    """Weight of the hidden-state MSE through the projection; 0 switches it off."""

    attention: float = result(1.0)
    """Weight of the MSE of attention scores (before softmax); needs equal head counts."""

    embedding: float = result(1.0)
    """Weight of the MSE of the embedding outputs (hidden state 0) through the projection."""

    attention_probs: float = result(0.0)
    """Weight of KL(teacher || student) of the attention probabilities; needs equal head counts."""

    relation: float = result(0.0)
    """Weight of the MiniLMv2 relation KL (Q-Q, K-K, V-V); any head counts."""

    cosine: float = result(0.0)
    """Weight of 1 - cosine of the hidden states through the projection."""

    pooled: float = result(0.0)
    """Weight of the loss of pooled last hidden states, the vector of a text as the teacher makes it."""

    logits: float = result(0.0)
    """Weight of the KL of the MLM logits at `temperature`; teacher and student need an MLM head and one vocabulary."""

    mlm: float = result(0.0)
    """Weight of the MLM cross-entropy on masked positions; needs data.mlm_probability > 0."""

    temperature: float = result(1.0)
    """Temperature T of the logits KL (scaled by T squared)."""

    relation_heads: int | None = result(None)
    """Relation heads of `relation`; must divide both widths. Unset: the teacher's number of heads."""

    relation_weights: list[float] = result(factory=lambda: [1.0, 1.0, 1.0])
    """Weights of the Q-Q, K-K and V-V relations."""

    pooled_weights: list[float] = result(factory=lambda: [1.0, 0.0, 0.0])
    """Weights, in `pooled`, of 1 - cosine, of the mean squared distance, and of the KL of the softmax of a text's
    cosines to the other texts of the micro batch, over all ranks."""

    pooled_temperature: float = result(0.05)
    """Temperature of that softmax."""

    projection: Literal["shared", "per_layer", "single", "identity"] | None = result(None)
    """Student width -> teacher width. shared: one for all layers and one for the embeddings; per_layer: one for each
    student layer; single: the same one for layers and embeddings; identity: none (equal widths). Unset: identity where
    the student starts from teacher layers of its own width, else shared (tinybert: single)."""

    projection_bias: bool | None = result(None)
    """Whether projections have a bias; unset: no (tinybert: yes)."""

    projection_init: Literal["fitted", "random"] | None = result(None)
    """fitted: projections start as the ridge regression of the teacher's states on those of the initial student, over
    `slice_tokens` of the corpus; random: from the seed. Unset: fitted (tinybert: random)."""

    scale: Literal["teacher", "none"] | None = result(None)
    """teacher: each hidden-state, embedding and attention-score term is divided by the variance of its target over
    `slice_tokens` of the corpus, so that it is the share of the teacher's variance that is not explained; none: raw
    values. Unset: teacher (tinybert: none)."""

    slice_tokens: int = result(12288)
    """Positions of the corpus from which `projection_init` and `scale` are computed once, before the first step."""

    average_layers: bool | None = result(None)
    """Divide each layer-mapped loss by its number of active layers, so that a mapping with skips keeps the effective
    learning rate; unset: yes (tinybert: no, a sum)."""

    def __post_init__(self) -> None:
        for name in LOSS_NAMES:
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "a loss weight must be >= 0")
        require(self.temperature > 0, "loss.temperature", self.temperature, "must be > 0")
        require(self.slice_tokens >= 1, "loss.slice_tokens", self.slice_tokens, "must be at least 1")
        require(
            self.relation_heads is None or self.relation_heads >= 1,
            "loss.relation_heads",
            self.relation_heads,
            "must be at least 1",
        )
        require(
            len(self.relation_weights) == 3 and min(self.relation_weights) >= 0 and max(self.relation_weights) > 0,
            "loss.relation_weights",
            self.relation_weights,
            "give three weights >= 0 for Q-Q, K-K and V-V, not all 0",
        )
        require(
            len(self.pooled_weights) == 3 and min(self.pooled_weights) >= 0 and max(self.pooled_weights) > 0,
            "loss.pooled_weights",
            self.pooled_weights,
            "give three weights >= 0 for cosine, distance and similarity, not all 0",
        )
        require(self.pooled_temperature > 0, "loss.pooled_temperature", self.pooled_temperature, "must be > 0")
        if self.preset == "tinybert":
            for name in ("projection", "projection_bias", "average_layers", "projection_init", "scale"):
                require(
                    getattr(self, name) is None,
                    f"loss.{name}",
                    getattr(self, name),
                    "remove it: loss.preset='tinybert' fixes it (or write loss.preset=clean)",
                )

    @property
    def active(self) -> dict[str, float]:
        """The losses with a weight above 0, in the order of LOSS_NAMES."""
        return {name: getattr(self, name) for name in LOSS_NAMES if getattr(self, name) > 0}

    def projection_kind(self, *, same_space: bool) -> str:
        """Returns `projection`, or where it is unset the preset's.

        same_space: whether the student's states start as the teacher's, of one width and made by copied layers.
        """
        if self.projection is not None:
            return self.projection
        return "single" if self.preset == "tinybert" else "identity" if same_space else "shared"

    @property
    def resolved_projection_bias(self) -> bool:
        return self.preset == "tinybert" if self.projection_bias is None else self.projection_bias

    @property
    def fits_projections(self) -> bool:
        return (self.projection_init or ("random" if self.preset == "tinybert" else "fitted")) == "fitted"

    @property
    def scales(self) -> bool:
        return (self.scale or ("none" if self.preset == "tinybert" else "teacher")) == "teacher"

    @property
    def resolved_average_layers(self) -> bool:
        return self.preset != "tinybert" if self.average_layers is None else self.average_layers


LOSS_NAMES = ("hidden", "attention", "embedding", "attention_probs", "relation", "cosine", "pooled", "logits", "mlm")
"""Every loss, in the order in which they are logged."""

HIDDEN_MAPPED = ("hidden", "cosine")
ATTENTION_MAPPED = ("attention", "attention_probs", "relation")


def trained_pairs(loss: LossConfig, mapping: MappingPair) -> frozenset[tuple[int, int]]:
    """Returns (student layer, teacher layer) of all that a loss compares under this mapping; layer 0 is the
    embeddings."""
    pairs: set[tuple[int, int]] = {(0, 0)} if "embedding" in loss.active else set()
    if set(HIDDEN_MAPPED) & set(loss.active):
        pairs.update(mapping.hidden.pairs)
    if set(ATTENTION_MAPPED) & set(loss.active):
        pairs.update(mapping.attention.pairs)
    return frozenset(pairs)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared corpus, and masking."""

    path: PathText = located("data/news")
    """Folder that launch/prepare_data.py wrote (with manifest.json)."""

    seq_len: int | None = located(None)
    """Sequence length in tokens, as a check: must equal that of the prepared corpus; unset: no check."""

    eval_sequences: int = result(256)
    """Sequences at the end of the corpus that are held out for the evaluation loss and never trained on.
    0, or at least one for each rank."""

    mlm_probability: float = result(0.0)
    """Share of tokens chosen for masking (80 % mask token, 10 % random, 10 % kept); 0: no masking, as in layer-mapped
    distillation."""

    whole_word_mask: bool = result(False)
    """Choose whole words instead of single tokens for masking."""

    group_by_length: bool = result(False)
    """Make steps of sequences of about one length: those of 32 steps are sorted, and the steps shuffled. Batches of
    single sentences then have few pads; a packed corpus has few anyway."""

    verify: bool = how(True)
    """Compare every shard with its checksum, in the background: the ranks of a host read the whole corpus once. false:
    check only the size of a shard at its first use, for a corpus that not every host should read as a whole."""

    def __post_init__(self) -> None:
        require(self.eval_sequences >= 0, "data.eval_sequences", self.eval_sequences, "must be >= 0")
        require(0.0 <= self.mlm_probability < 1.0, "data.mlm_probability", self.mlm_probability, "must be in [0, 1)")
        require(self.seq_len is None or self.seq_len >= 4, "data.seq_len", self.seq_len, "must be at least 4 tokens")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    name: Literal["adamw", "lamb", "apex_fused_adam", "apex_fused_lamb"] = result("adamw")
    """adamw: DeepSpeed FusedAdam on a GPU, DeepSpeedCPUAdam with offload, torch's fused AdamW otherwise; lamb:
    DeepSpeed FusedLamb on a GPU, our own LAMB elsewhere (ZeRO stage 0 only); apex_*: NVIDIA Apex, an error when
    missing."""

    betas: list[float] = result(factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moments."""

    eps: float = result(1e-8)
    """Added to the square root of the second moment."""

    weight_decay: float = result(0.01)
    """Decoupled weight decay; biases and norms get none."""

    def __post_init__(self) -> None:
        require(
            len(self.betas) == 2 and all(0.0 <= b < 1.0 for b in self.betas),
            "optim.betas",
            self.betas,
            "give two numbers in [0, 1)",
        )
        require(self.eps > 0, "optim.eps", self.eps, "must be > 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be >= 0")


Schedule = Literal["linear", "cosine", "constant", "warmup_stable_decay"]
DECAY_SHARE = 0.2
WARMUP_SHARE = 0.1


def decay_steps(decay_share: float | None, steps: int) -> int:
    """Returns the optimizer steps of the decay of warmup_stable_decay, at least 1."""
    return max(1, round(decay_share_of(decay_share) * steps))


def decay_share_of(setting: float | None) -> float:
    return DECAY_SHARE if setting is None else setting


def require_decay(schedule: Schedule, decay_share: float | None) -> None:
    require(
        decay_share is None or schedule == "warmup_stable_decay",
        "train.decay_share",
        decay_share,
        f"remove it: train.schedule={schedule!r} has no decay of its own (or write train.schedule=warmup_stable_decay)",
    )
    require(decay_share is None or 0.0 < decay_share <= 1.0, "train.decay_share", decay_share, "must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch and learning rate, and how often a run logs, evaluates and saves."""

    steps: int = result(300)
    """Optimizer steps of the whole run."""

    global_batch: int = result(32)
    """Sequences per optimizer step over all ranks; gradient accumulation is derived from it and the micro batch."""

    lr: float = result(5e-4)
    """Peak learning rate."""

    warmup_steps: int | None = result(None)
    """Optimizer steps of linear warm-up from 0; unset: a tenth of `steps`."""

    schedule: Schedule = result("linear")
    """Learning rate after the warm-up: to 0 at `steps` linearly or by a half cosine, constant, or constant with a
    linear decay to 0 at the end (warmup_stable_decay): runs of different `steps` and equal `warmup_steps` are then
    identical up to their decays."""

    decay_share: float | None = result(None)
    """Share of `steps` that the decay of warmup_stable_decay takes; unset: 0.2. Not with other schedules."""

    grad_clip: float = result(1.0)
    """Largest global gradient norm; 0: no clipping."""

    log_every: int = how(10)
    """Optimizer steps between step records, TensorBoard points and progress updates."""

    eval_every: int = how(100)
    """Optimizer steps between held-out losses, which are also computed before the first step and after the last; 0:
    never."""

    save_every: int = how(100)
    """Optimizer steps between checkpoints; one more is written at the end. 0: only at the end."""

    keep: int = how(2)
    """Newest complete checkpoints that are kept."""

    keep_best: bool = how(False)
    """Export the student of the step with the lowest held-out loss, in place of the last step's. Every evaluation
    (`eval_every`) that is better than all before it writes a checkpoint, which is kept beside the newest ones."""

    patience: int | None = how(None)
    """Early stopping: end after this many evaluations in a row without a better held-out loss, and export the best step
    as `keep_best` does. Unset: train all steps. Not with warmup_stable_decay, whose loss falls in the decay at its
    end."""

    patience_threshold: float = how(0.0)
    """Decrease of the held-out loss that counts as better for `patience`; 0: any decrease."""

    hang_timeout_s: float = how(600.0)
    """Seconds without a finished micro step, evaluation batch or checkpoint after which a rank writes its stacks to
    `hangs/` in the run directory and ends with code 1 (a lost network, a stuck rank elsewhere); 0: never."""

    skip_bad_steps: int = how(0)
    """Steps of one launch that may be left out because their loss is not finite: the weights stay as they were, and a
    record names terms and sequences. One more such step ends the run with code 3."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "must be >= 0"
        )
        for name in ("grad_clip", "eval_every", "save_every", "hang_timeout_s", "skip_bad_steps"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be >= 0")
        require(self.lr > 0, "train.lr", self.lr, "must be > 0")
        require(
            self.warmup_steps is None or self.warmup_steps <= self.steps,
            "train.warmup_steps",
            self.warmup_steps,
            f"must not exceed the number of steps, {self.steps}",
        )
        require_decay(self.schedule, self.decay_share)
        self._check_keeping()
        if self.schedule == "warmup_stable_decay" and 0.0 < decay_share_of(self.decay_share) <= 1.0:
            require(
                self.resolved_warmup_steps + self.decay_steps <= self.steps,
                "train.decay_share",
                self.decay_share,
                f"{self.decay_steps} steps of decay and {self.resolved_warmup_steps} of warm-up must not exceed the "
                f"number of steps, {self.steps}",
            )

    def _check_keeping(self) -> None:
        patience, threshold = self.patience, self.patience_threshold
        require(patience is None or patience >= 1, "train.patience", patience, "must be at least 1")
        require(threshold >= 0, "train.patience_threshold", threshold, "must be >= 0")
        require(
            patience is not None or threshold == 0,
            "train.patience_threshold",
            threshold,
            "remove it, or set train.patience: without it no run ends early",
        )
        require(
            patience is None or self.schedule != "warmup_stable_decay",
            "train.patience",
            patience,
            "remove it: the loss of train.schedule='warmup_stable_decay' falls in the decay at its end, which an early "
            "stop would leave out; train.keep_best works with it",
        )
        require(
            self.eval_every > 0 or not self.keeps_best,
            "train.eval_every",
            self.eval_every,
            "must be > 0: train.keep_best and train.patience compare the held-out losses of evaluations",
        )

    @property
    def keeps_best(self) -> bool:
        """Whether the best step is exported, and not the last one"""
        return self.keep_best or self.patience is not None

    @property
    def resolved_warmup_steps(self) -> int:
        return round(WARMUP_SHARE * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def decay_steps(self) -> int:
        """Optimizer steps of the decay of warmup_stable_decay."""
        return decay_steps(self.decay_share, self.steps)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints lie, and what happens when one cannot be written."""

    storage: Literal["shared", "local"] = how("shared")
    """shared: all hosts see one output_dir. local: output_dir lies on a disk of each host, which keeps the shards of
    its own ranks; records, TensorBoard and the student are on the first host alone."""

    on_error: Literal["stop", "continue"] = how("stop")
    """Action when a checkpoint cannot be written (a full disk): end with code 1, or go on and try again at the next
    one. Earlier checkpoints stay intact in both cases."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What computes the losses, and whether padding is computed."""

    backend: Literal["auto", "triton", "torch", "reference"] = how("auto")
    """What computes the losses with their gradients. triton: on a GPU; torch: anywhere; reference: the plain formulas,
    by autograd, slow; auto: triton on a GPU where it is installed, else torch."""

    attention: Literal["auto", "tile", "gram"] = how("auto")
    """Computation of the MSE of attention scores. tile: scores in tiles, never all in memory; gram: no scores at all,
    time grows with the length and not with its square; auto: by length, from the measured table in
    docs/benchmarks.md."""

    gram_sums: Literal["auto", "float32", "float64"] = how("auto")
    """Precision of the sums of Gram matrices; in float32 small losses are noise (their gradients are not). auto:
    float64 on devices that are fast enough at it."""

    unpadded: bool = how(True, teacher=True)
    """Run padded batches without their padding, if the model computes the same (checked at launch); not with
    loss.preset=tinybert, which counts padding."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output_dir: PathText = how("runs/distill")
    """Run directory; the same command again continues the run in it."""

    seed: int = evaluation(0)
    """Seed of weights, data order, masking and dropout."""

    accept_changes: bool = how(False)
    """Continue although steps, batch, learning rate, weights of losses or the corpus have changed since the checkpoint.
    Records and model card then name the changes."""

    resume: str = how("auto")
    """auto: continue from the newest complete checkpoint; never: train from the beginning (refused if there are
    checkpoints); or the name of a checkpoint, like step-00000100."""

    deepspeed_config: PathText = how("auto")
    """DeepSpeed JSON (see ds_configs/README.md); auto: zero1_bf16.json on a GPU, zero0_bf16.json on a CPU with AMX
    or AVX-512 bf16, zero0_fp32.json elsewhere."""

    dry_run: bool = how(False)
    """Stop after the start-up banner."""

    require_fused: bool = how(False)
    """Make a fallback to a slower optimizer or kernel an error."""

    measure: bool = how(True)
    """Measure at the end how much smaller and faster the student is than its teacher, for the result and the model
    card."""

    allow_pickle: bool = how(False)
    """Accept weights in pytorch_model.bin, a pickle, of which only tensors are read. false: safetensors only."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    mapping: MappingConfig = field(default_factory=MappingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")
        require(
            self.resume in ("auto", "never") or is_tag(self.resume),
            "resume",
            self.resume,
            f"write auto, never, or the name of a checkpoint, like {step_tag(100)}",
        )
        require(
            self.student.init != "mapping" or self.mapping.hidden != RANDOM_EACH_STEP,
            "student.init",
            self.student.init,
            f"mapping.hidden={RANDOM_EACH_STEP} has no layers of its own to copy; write student.init=uniform",
        )
        require(
            self.data.eval_sequences > 0 or not self.train.keeps_best,
            "data.eval_sequences",
            self.data.eval_sequences,
            "must be > 0: train.keep_best and train.patience compare losses of held-out sequences",
        )
