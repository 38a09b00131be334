"""The loss kernels of a run behind one interface: chosen once, from device, dtype and length, and said in the
banner."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engine.config.distill import KernelConfig
from engine.errors import UserError
from engine.kernels import attention_gram, attention_tile, hidden_mse, reference, softmax_kl, vocabulary
from engine.kernels.segments import Segments

GRAM_FROM = {"cpu": 288, "cuda": 512}
"""Tokens from which Gram matrices are faster than tiles. CPU: measured, summed in float64 (docs/benchmarks.md, "Loss
kernels": a tie at 256, twice as fast at 512). CUDA: from a model of the traffic, not measured."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 128
"""Of Triton's kernels; relation heads can be wider."""
FAST_FLOAT64 = ((8, 0), (9, 0))
"""CUDA compute capabilities with float64 tensor cores: A100 and H100."""


class Rows(NamedTuple):
    """Which rows of a batch are real tokens: a mask over padded sequences, or packed sequences, with a mask where some
    of their pads were kept."""

    mask: torch.Tensor | None = None
    """(B, L) or (1, T) bool; None: all"""
    segments: Segments | None = None
    """Of tensors (1, T, D) or (1, H, T, d)"""


class Attention(NamedTuple):
    """Queries (B, H, L, d) and keys (B, H or fewer, L, d) of both sides, the factors on Q K^T, and how many tokens to
    each side the layers attend to (None: all)."""

    q_s: torch.Tensor
    k_s: torch.Tensor
    q_t: torch.Tensor
    k_t: torch.Tensor
    scale_s: float
    scale_t: float
    window_s: int | None = None
    window_t: int | None = None

    @property
    def window(self) -> int | None:
        """Of the pairs of tokens that both layers attend to."""
        return reference.narrower(self.window_s, self.window_t)

    def with_all_heads(self) -> Attention:
        """Grouped keys repeated for each query head."""
        reference.check_same_shape("(batch, heads, length)", self.q_s.shape[:3], self.q_t.shape[:3])
        heads = self.q_s.shape[1]
        return self._replace(k_s=reference.repeat_heads(self.k_s, heads), k_t=reference.repeat_heads(self.k_t, heads))

    def padded(self, segments: Segments) -> Attention:
        return self._with(segments.padded(x, 2) for x in self[:4])

    def without_kept_pads(self, segments: Segments) -> Attention:
        return self._with(x[:, :, : segments.tokens] for x in self[:4])

    def _with(self, tensors: Iterable[torch.Tensor]) -> Attention:
        return Attention(*tensors, *self[4:])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kernels:
    """Every method returns scalars in float32 (float64 for float64 inputs), normalised as engine/kernels/reference.py
    says, and gives the student's tensors their gradients."""

    backend: str = "torch"
    """triton, torch, or reference"""
    attention: str = "tile"
    """tile or gram"""
    gram_sums: torch.dtype = torch.float32
    why: str = ""

    def __str__(self) -> str:
        if self.backend == "reference":
            return f"plain formulas of engine/kernels/reference.py, by autograd ({self.why})"
        scores = "Gram matrices" if self.attention == "gram" else "tiles"
        sums = ", summed in float64" if self.attention == "gram" and self.gram_sums == torch.float64 else ""
        name = "Triton" if self.backend == "triton" else "PyTorch"
        return f"{name}, values and gradients in one pass; attention scores by {scores}{sums} ({self.why})"

    def attention_score_mse(
        self, inputs: Attention, rows: Rows, *, pairs: float, tinybert: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MSE of attention scores, differentiable, and the mean of the teacher's squared scores over the same
        pairs, detached. pairs: of real tokens that both layers attend to, or of positions for `tinybert`, which needs
        padded batches."""
        assert not (tinybert and rows.segments is not None), "TinyBERT's mean over positions needs them"
        if self.backend == "reference":
            return _reference_scores(inputs, rows, pairs, tinybert)
        inputs = inputs.with_all_heads()
        factor = 1.0 / reference.normaliser(inputs.q_s.shape[1] * pairs)
        scales = {"scale_s": inputs.scale_s, "scale_t": inputs.scale_t}
        window = inputs.window
        if self.attention == "tile" or tinybert or window is not None:  # Gram matrices cannot leave out single scores
            if self._on_triton(*inputs[:4], widest_head=WIDEST_HEAD):
                from engine.kernels.triton import attention

                inputs, mask = _as_packed(inputs, rows)
                return attention.score_mse(
                    *inputs[:4],
                    **scales,
                    segments=rows.segments,
                    mask=mask,
                    factor=factor,
                    tinybert=tinybert,
                    window=window,
                )
            inputs, mask = _as_padded(inputs, rows)
            return attention_tile.score_mse(
                *inputs[:4], **scales, mask=mask, factor=factor, tinybert=tinybert, window=window
            )
        inputs, mask = _as_padded(inputs, rows)
        return attention_gram.score_mse(*inputs[:4], **scales, mask=mask, factor=factor, accumulate=self.gram_sums)

    def softmax_kl(self, inputs: Attention, rows: Rows, *, tokens: float) -> torch.Tensor:
        """KL(P_t || P_s) of softmax(scale Q K^T) over real keys in the window, mean over heads and real queries."""
        settings: dict[str, Any] = {name: getattr(inputs, name) for name in Attention._fields[4:]}
        if self.backend == "reference":
            inputs, mask = _as_padded(inputs, rows)
            return reference.attention_probs_kl(*inputs[:4], **settings, mask=mask, tokens=tokens)
        inputs = inputs.with_all_heads()
        factor = 1.0 / reference.normaliser(inputs.q_s.shape[1] * tokens)
        if self._on_triton(*inputs[:4], widest_head=WIDEST_HEAD):
            from engine.kernels.triton import kl

            inputs, mask = _as_packed(inputs, rows)
            return kl.softmax_kl(*inputs[:4], **settings, segments=rows.segments, mask=mask, factor=factor)
        inputs, mask = _as_padded(inputs, rows)
        return softmax_kl.softmax_kl(*inputs[:4], **settings, mask=mask, factor=factor)

    def relation_kl(
        self, x_s: torch.Tensor, x_t: torch.Tensor, rows: Rows, *, relation_heads: int, tokens: float
    ) -> torch.Tensor:
        """KL(R_t || R_s) of self-relations softmax(X X^T / sqrt(d_r)); x (B, H, L, d), re-split into relation heads."""
        x_s, x_t = (reference.split_heads(x, relation_heads) for x in (x_s, x_t))
        scale_s, scale_t = (x.shape[-1] ** -0.5 for x in (x_s, x_t))
        return self.softmax_kl(Attention(x_s, x_s, x_t, x_t, scale_s, scale_t), rows, tokens=tokens)

    def hidden_mse(
        self,
        states: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        rows: Rows,
        *,
        tokens: float,
        coefficients: Sequence[float],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum of coefficient * MSE over pairs of hidden states (B, L, D), the states through one projection (weight
        (D_t, D_s) and bias (D_t,), if any), differentiable; and the MSEs (pairs,), detached."""
        if self.backend == "reference":
            return _reference_hidden(states, targets, rows.mask, tokens, coefficients, weight, bias)
        shared = {"mask": rows.mask, "tokens": tokens, "coefficients": coefficients}
        same = len({x.dtype for x in states}) == len({x.dtype for x in targets}) == 1
        if weight is None and same and self._on_triton(*states, *targets):
            from engine.kernels.triton import hidden

            return hidden.hidden_mse(states, targets, **shared)  # type: ignore[arg-type]
        return hidden_mse.hidden_mse(states, targets, weight=weight, bias=bias, **shared)  # type: ignore[arg-type]

    def vocabulary_losses(
        self,
        student: vocabulary.Head | torch.Tensor,
        *,
        teacher: vocabulary.Head | torch.Tensor | None,
        labels: torch.Tensor | None,
        by: vocabulary.Weights,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """by.kl * KL + by.cross_entropy * CE of MLM logits at the rows of the heads, differentiable; and (2,) KL and
        CE, detached (0 for the one that has no teacher or no labels)."""
        if self.backend == "reference" or isinstance(student, torch.Tensor):  # logits that a model made whole
            return _reference_vocabulary(student, teacher, labels, by)
        return vocabulary.vocabulary_losses(student, teacher=teacher, labels=labels, by=by)

    def _on_triton(self, *tensors: torch.Tensor, widest_head: int | None = None) -> bool:
        """Kernels of float32 products, or of wider heads, would not fit into the registers; PyTorch computes those."""
        fits = widest_head is None or max(x.shape[-1] for x in tensors) <= widest_head
        return self.backend == "triton" and fits and all(x.dtype in SIXTEEN_BITS for x in tensors)


def _as_packed(inputs: Attention, rows: Rows) -> tuple[Attention, torch.Tensor | None]:
    """For kernels that go through the sequences alone: gradients of kept pads would stay unwritten."""
    if rows.segments is None:
        return inputs, rows.mask
    return inputs.without_kept_pads(rows.segments), None


def _as_padded(inputs: Attention, rows: Rows) -> tuple[Attention, torch.Tensor | None]:
    if rows.segments is None:
        return inputs, rows.mask
    return inputs.padded(rows.segments), rows.segments.mask_on(inputs.q_s.device)


def _reference_scores(inputs: Attention, rows: Rows, pairs: float, tinybert: bool) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, mask = _as_padded(inputs, rows)
    settings = {"scale_s": inputs.scale_s, "scale_t": inputs.scale_t, "window": inputs.window, "mask": mask}
    nothing = [torch.zeros_like(x[..., :1]) for x in inputs[:2]]
    sides = (inputs[:4], (*nothing, inputs.q_t, inputs.k_t))
    if tinybert:
        of = [reference.attention_score_mse_tinybert(*side, **settings, position_pairs=pairs) for side in sides]  # type: ignore[arg-type]
    else:
        of = [reference.attention_score_mse(*side, **settings, token_pairs=pairs) for side in sides]  # type: ignore[arg-type]
    return of[0], of[1].detach()


def _reference_hidden(
    states: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    tokens: float,
    coefficients: Sequence[float],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = []
    for state, target in zip(states, targets, strict=True):
        if mask is not None:  # the weight's gradient is a sum over all tokens, where 0 * NaN would be NaN
            state = state.masked_fill(~mask[:, :, None], 0.0)
        if weight is not None:
            state = torch.nn.functional.linear(state.to(weight.dtype), weight, bias)
        values.append(reference.hidden_mse(state, target, mask, tokens))
    each = torch.stack(values)
    return (each * each.new_tensor(coefficients)).sum(), each.detach()


def _reference_vocabulary(
    student: vocabulary.Head | torch.Tensor,
    teacher: vocabulary.Head | torch.Tensor | None,
    labels: torch.Tensor | None,
    by: vocabulary.Weights,
) -> tuple[torch.Tensor, torch.Tensor]:
    everything = slice(None)
    z_s = student.logits(everything) if isinstance(student, vocabulary.Head) else student
    zero = z_s.sum() * 0.0
    kl = cross_entropy = zero
    if teacher is not None:
        z_t = teacher.logits(everything) if isinstance(teacher, vocabulary.Head) else teacher
        kl = reference.logits_kl(z_s, z_t, temperature=by.temperature, count=by.count)
    if labels is not None:
        cross_entropy = reference.mlm_cross_entropy(z_s, labels, count=by.count)
    each = torch.stack([kl, cross_entropy])
    return by.kl * kl + by.cross_entropy * cross_entropy, each.detach()


def choose_kernels(
    config: KernelConfig, *, device: torch.device, seq_len: int, tinybert: bool, precisions: Collection[str] = ()
) -> Kernels:
    """precisions: names of the dtypes of student and teacher. Raises UserError for kernels that were asked for and
    cannot be used here."""
    backend, why = _backend(config, device, wide="float32" in precisions)
    if config.attention == "gram" and tinybert:
        raise UserError(
            "kernels.attention=gram: Gram matrices cannot leave out single scores, as loss.preset=tinybert does; write "
            "tile or auto"
        )
    attention = config.attention
    if attention == "auto":
        attention = "gram" if seq_len >= GRAM_FROM[device.type] and not tinybert else "tile"
        how = "measured" if device.type == "cpu" else "modelled to be"
        why += f", {how} faster at length {seq_len}" if backend != "reference" else ""
    sums = config.gram_sums
    if sums == "auto":
        fast = device.type == "cpu" or torch.cuda.get_device_capability(device) in FAST_FLOAT64
        sums = "float64" if fast else "float32"
    return Kernels(backend, attention, getattr(torch, sums), why)


def _backend(config: KernelConfig, device: torch.device, *, wide: bool) -> tuple[str, str]:
    if config.backend in ("torch", "reference"):
        return config.backend, f"kernels.backend={config.backend}"
    missing = importlib.util.find_spec("triton") is None
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if config.backend == "triton":
        if missing:
            raise UserError("kernels.backend=triton: Triton is not installed (pip install triton); write auto or torch")
        if not runs:
            raise UserError(
                "kernels.backend=triton: Triton needs a GPU, and this run is on the CPU; write auto or torch"
            )
        if wide:
            raise UserError(
                "kernels.backend=triton: its kernels are for 16 bits, and this run computes in float32 "
                "(deepspeed_config, teacher.dtype); write auto or torch"
            )
        return "triton", "kernels.backend=triton"
    if device.type == "cuda":
        if wide:
            return "torch", "auto: Triton's kernels are for 16 bits"
        return ("torch", "auto: Triton is not installed") if missing else ("triton", "auto: on a GPU")
    return "torch", "auto: on a CPU"
