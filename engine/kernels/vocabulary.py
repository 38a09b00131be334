"""Losses over the vocabulary without the logits: some positions at a time go through the output matrices, and the
gradients of hidden states, matrix and bias are ready at the end of the forward.

With z = h W^T + b, tau the temperature, f = 1 / count and P = softmax: of KL = f tau^2 sum KL(P(z_t / tau) || P(z_s /
tau)) the gradient is dz_s = f tau (P(z_s / tau) - P(z_t / tau)), of CE = -f sum log P(z_s)[label] it is f (P(z_s) -
onehot). The gradient of a tied matrix is that of an input like any other: autograd adds it to the embeddings'."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from engine.kernels.exact import exact_products, product_over_rows, scaled, widest
from engine.kernels.inputs import UNSCORED_LABEL, Head, MlmLogits, check_same_shape, normaliser

ENTRIES_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}
"""Logits that exist at a time. CPU: 32 MiB in fp32, 274 positions of BERT's vocabulary. CUDA: 512 MiB."""
LIFT = 4096.0
"""Factor of differences of probabilities before they are rounded to float16, where small ones would vanish; divided by
the weights of the losses, so that none overflows."""


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: MlmLogits,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student, teacher, labels, weights = inputs
        assert isinstance(student, Head)
        kind = widest(hidden, weight)
        tau = weights.temperature
        lift = LIFT / max(1.0, weights.kl * tau + weights.cross_entropy) if weight.dtype == torch.float16 else 1.0
        needs_gradient = any(ctx.needs_input_grad[:3])
        device, (hidden_wanted, weight_wanted, bias_wanted) = hidden.device, ctx.needs_input_grad[:3]
        d_hidden = torch.empty(hidden.shape, dtype=kind, device=device) if hidden_wanted else None
        d_bias = torch.zeros(len(weight), dtype=kind, device=device) if bias_wanted else None
        sums = torch.zeros(2, dtype=kind, device=device)
        most = max(1, ENTRIES_AT_ONCE[device.type] // len(weight))
        # As large as the matrix itself: that of one part is kept as it is, those of several are summed in float32.
        d_weight = torch.zeros_like(weight) if weight_wanted and not len(hidden) else None
        if weight_wanted and len(hidden) > most:
            d_weight = torch.zeros(weight.shape, dtype=kind, device=device)
        with exact_products(device):
            for start in range(0, len(hidden), most):
                part = slice(start, start + most)
                z_s = student.logits(part).to(kind)
                log_s = torch.log_softmax(z_s, dim=-1) if labels is not None or tau == 1.0 else z_s
                d_logits = None
                if labels is not None:
                    weight_ce = weights.cross_entropy * lift
                    value, d_logits = _cross_entropy(log_s, labels[part], weight_ce, gradient=needs_gradient)
                    sums[1] += value
                if teacher is not None:
                    if tau != 1.0:
                        log_s = torch.log_softmax(z_s / tau, dim=-1)
                    z_t = (teacher.logits(part) if isinstance(teacher, Head) else teacher[part]).to(kind)
                    value, of_kl = _kl(log_s, z_t, tau, weights.kl * lift, gradient=needs_gradient)
                    sums[0] += value
                    d_logits = of_kl if d_logits is None or of_kl is None else d_logits.add_(of_kl)
                if d_logits is None:
                    continue
                narrow = d_logits.to(weight.dtype)
                if d_hidden is not None:
                    d_hidden[part] = narrow @ weight
                if weight_wanted:
                    product = product_over_rows(narrow, hidden[part].to(weight.dtype))
                    d_weight = product if d_weight is None else d_weight.add_(product)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        factor = 1.0 / normaliser(weights.count) if len(hidden) else 0.0
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.factor, ctx.dtypes = factor / lift, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        each = sums * factor
        ctx.mark_non_differentiable(each)
        return each[0] * weights.kl + each[1] * weights.cross_entropy, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream * ctx.factor
        grads = (
            None if gradient is None else scaled(gradient, scale, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None


def _cross_entropy(
    log_p: torch.Tensor, labels: torch.Tensor, weight: float, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the sum over labelled rows of -log p[label], and weight * its gradient by the logits."""
    ignored = (labels == UNSCORED_LABEL).unsqueeze(1)
    index = labels.unsqueeze(1).masked_fill(ignored, 0)
    value = -log_p.gather(1, index).masked_fill_(ignored, 0.0).sum()
    if not gradient:
        return value, None
    p = log_p.exp()
    p.scatter_add_(1, index, p.new_full((1, 1), -1.0).expand(index.shape))
    return value, p.mul_((~ignored).to(p.dtype).mul_(weight))


def _kl(
    log_s: torch.Tensor, z_t: torch.Tensor, tau: float, weight: float, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns tau^2 * sum over rows of KL(softmax(z_t / tau) || P_s), and weight * its gradient by the student's
    logits. log_s: log P_s = log softmax(z_s / tau), which is overwritten."""
    check_same_shape("logits", log_s.shape, z_t.shape)
    log_t = torch.log_softmax(z_t if tau == 1.0 else z_t / tau, dim=-1)
    p_t = log_t.exp()
    value = torch.dot(p_t.flatten(), log_t.sub_(log_s).flatten()) * tau**2
    return value, log_s.exp_().sub_(p_t).mul_(weight * tau) if gradient else None


def vocabulary_losses(inputs: MlmLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights.kl * reference.logits_kl + weights.cross_entropy * reference.mlm_cross_entropy, differentiable in
    the three tensors of the student's head, and (2,) the two values, detached: 0 for the one that has no teacher or no
    labels. P may be 0."""
    student = inputs.student
    assert isinstance(student, Head)
    total, each = _VocabularyLosses.apply(student.hidden, student.weight, student.bias, inputs)
    return total, each
