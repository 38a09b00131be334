"""The loss kernels of a run behind one interface: chosen once, from device, dtype and length, and named in the
banner."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch

from engine.config.distill import KernelConfig
from engine.errors import UserError
from engine.kernels import attention_gram, attention_tile, hidden_mse, reference, softmax_kl, vocabulary
from engine.kernels.inputs import Attention, Head, HiddenPairs, MlmLogits, normaliser

GRAM_FROM = {"cpu": 288, "cuda": 512}
"""Tokens from which Gram matrices are faster than tiles. CPU: measured, summed in float64 (docs/benchmarks.md, "Loss
kernels": a tie at 256, twice as fast at 512). CUDA: from a model of the traffic, not measured."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 128
"""Width of a head up to which Triton's kernels go; relation heads can be wider."""
FAST_FLOAT64 = ((8, 0), (9, 0))
"""CUDA compute capabilities with float64 tensor cores: A100 and H100."""


@dataclass(frozen=True)
class Kernels:
    """How losses are computed. Every method returns scalars in float32 (float64 for float64 inputs), normalised as
    engine/kernels/reference.py says, and gives the student's tensors their gradients."""

    backend: str = "torch"
    """Implementation: triton, torch, or reference"""
    attention: str = "tile"
    """Way to attention scores: tile or gram"""
    gram_sums: torch.dtype = torch.float32
    """Dtype in which Gram matrices are summed"""
    why: str = ""
    """Reason of the choice of the implementation, for the banner"""
    attention_why: str = ""
    """Reason of the way to attention scores, for the banner"""

    def describe(self, losses: Collection[str]) -> str:
        """Returns in words what computes these losses."""
        if self.backend == "reference":
            return f"plain formulas of engine/kernels/reference.py, by autograd ({self.why})"
        name = "Triton" if self.backend == "triton" else "PyTorch"
        text = f"{name}, values and gradients in one pass ({self.why})"
        if "attention" in losses:
            scores = "Gram matrices" if self.attention == "gram" else "tiles"
            sums = ", summed in float64" if self.attention == "gram" and self.gram_sums == torch.float64 else ""
            text += f"; attention scores by {scores}{sums} ({self.attention_why})"
        return text

    def attention_score_mse(
        self, inputs: Attention, *, pairs: float, tinybert: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the MSE of attention scores, differentiable, and the mean of the teacher's squared scores over the
        same pairs, detached. pairs: how many real tokens that both layers attend to, or positions for `tinybert`, which
        needs padded batches."""
        assert not (tinybert and inputs.rows.segments is not None), "TinyBERT's mean over positions needs them"
        if self.backend == "reference":
            return _reference_scores(inputs.padded(), pairs, tinybert)
        inputs = inputs.with_all_heads()
        factor = 1.0 / normaliser(inputs.q_s.shape[1] * pairs)
        single_scores_left_out = tinybert or inputs.window is not None  # as Gram matrices cannot
        if self.attention == "gram" and not single_scores_left_out:
            return attention_gram.score_mse(inputs.padded(), factor=factor, accumulate=self.gram_sums)
        if self._on_triton(*inputs[:4], widest_head=WIDEST_HEAD):
            from engine.kernels.triton import attention

            return attention.score_mse(inputs.without_kept_pads(), factor=factor, tinybert=tinybert)
        return attention_tile.score_mse(inputs.padded(), factor=factor, tinybert=tinybert)

    def softmax_kl(self, inputs: Attention, *, tokens: float) -> torch.Tensor:
        """Returns KL(P_t || P_s) of softmax(scale Q K^T) over real keys in the window, mean over heads and real
        queries."""
        if self.backend == "reference":
            return reference.attention_probs_kl(inputs.padded(), tokens=tokens)
        inputs = inputs.with_all_heads()
        factor = 1.0 / normaliser(inputs.q_s.shape[1] * tokens)
        if self._on_triton(*inputs[:4], widest_head=WIDEST_HEAD):
            from engine.kernels.triton import kl

            return kl.softmax_kl(inputs.without_kept_pads(), factor=factor)
        return softmax_kl.softmax_kl(inputs.padded(), factor=factor)

    def hidden_mse(self, inputs: HiddenPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum of coefficient * MSE over pairs of hidden states, differentiable, and the MSEs (pairs,),
        detached."""
        if self.backend == "reference":
            return _reference_hidden(inputs)
        same = len({x.dtype for x in inputs.states}) == len({x.dtype for x in inputs.targets}) == 1
        if inputs.weight is None and same and self._on_triton(*inputs.states, *inputs.targets):
            from engine.kernels.triton import hidden

            return hidden.hidden_mse(inputs)
        return hidden_mse.hidden_mse(inputs)

    def vocabulary_losses(self, inputs: MlmLogits) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns weights.kl * KL + weights.cross_entropy * CE of MLM logits, differentiable, and (2,) KL and CE,
        detached: 0 for the one that has no teacher or no labels."""
        if self.backend == "reference" or isinstance(inputs.student, torch.Tensor):
            return _reference_vocabulary(inputs)
        return vocabulary.vocabulary_losses(inputs)

    def _on_triton(self, *tensors: torch.Tensor, widest_head: int | None = None) -> bool:
        """Returns whether Triton computes it: kernels of float32 products, or of wider heads, would not fit into the
        registers."""
        fits = widest_head is None or max(x.shape[-1] for x in tensors) <= widest_head
        return self.backend == "triton" and fits and all(x.dtype in SIXTEEN_BITS for x in tensors)


def _reference_scores(inputs: Attention, pairs: float, tinybert: bool) -> tuple[torch.Tensor, torch.Tensor]:
    teacher_alone = inputs._replace(
        q_s=torch.zeros_like(inputs.q_s[..., :1]), k_s=torch.zeros_like(inputs.k_s[..., :1])
    )
    if tinybert:
        score_mse = partial(reference.attention_score_mse_tinybert, position_pairs=pairs)
    else:
        score_mse = partial(reference.attention_score_mse, token_pairs=pairs)
    return score_mse(inputs), score_mse(teacher_alone).detach()


def _reference_hidden(inputs: HiddenPairs) -> tuple[torch.Tensor, torch.Tensor]:
    values = []
    for state, target in zip(inputs.states, inputs.targets, strict=True):
        if inputs.mask is not None:  # the weight's gradient is a sum over all tokens, where 0 * NaN would be NaN
            state = state.masked_fill(~inputs.mask[:, :, None], 0.0)
        if inputs.weight is not None:
            state = torch.nn.functional.linear(state.to(inputs.weight.dtype), inputs.weight, inputs.bias)
        values.append(reference.hidden_mse(state, target, inputs.mask, inputs.tokens))
    each = torch.stack(values)
    return (each * each.new_tensor(inputs.coefficients)).sum(), each.detach()


def _reference_vocabulary(inputs: MlmLogits) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher, labels, weights = inputs
    everything = slice(None)
    z_s = student.logits(everything) if isinstance(student, Head) else student
    kl = cross_entropy = z_s.sum() * 0.0
    if teacher is not None:
        z_t = teacher.logits(everything) if isinstance(teacher, Head) else teacher
        kl = reference.logits_kl(z_s, z_t, temperature=weights.temperature, count=weights.count)
    if labels is not None:
        cross_entropy = reference.mlm_cross_entropy(z_s, labels, count=weights.count)
    return weights.kl * kl + weights.cross_entropy * cross_entropy, torch.stack([kl, cross_entropy]).detach()


def choose_kernels(
    config: KernelConfig, *, device: torch.device, seq_len: int, tinybert: bool, precisions: Collection[str] = ()
) -> Kernels:
    """Returns the kernels of a run. precisions: names of the dtypes of student and teacher. Raises UserError for
    kernels that were asked for and cannot be used here."""
    backend, why = _backend(config, device, wide="float32" in precisions)
    if config.attention == "gram" and tinybert:
        raise UserError(
            "kernels.attention=gram: Gram matrices cannot leave out single scores, as loss.preset=tinybert does; write "
            "tile or auto"
        )
    attention, attention_why = config.attention, f"kernels.attention={config.attention}"
    if attention == "auto" and tinybert:
        attention, attention_why = "tile", "auto: loss.preset=tinybert leaves out single scores"
    elif attention == "auto":
        attention = "gram" if seq_len >= GRAM_FROM[device.type] else "tile"
        how = "measured" if device.type == "cpu" else "modelled to be"
        attention_why = f"auto: {how} faster at length {seq_len}"
    sums = config.gram_sums
    if sums == "auto":
        fast = device.type == "cpu" or torch.cuda.get_device_capability(device) in FAST_FLOAT64
        sums = "float64" if fast else "float32"
    return Kernels(backend, attention, getattr(torch, sums), why, attention_why)


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
