"""Word embeddings of the tokens that a short job can meet, instead of the whole vocabulary.

A token that never occurs has no gradient, so its embedding does not influence the student. In a narrow student most
weights are such embeddings: clearing, checking, clipping and updating them every step cost a proxy more than the rest
of its optimizer (docs/benchmarks.md, "Proxy cohorts").
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class CompactEmbedding(nn.Embedding):
    """Embeddings of some tokens, which take ids of the whole vocabulary. An id that was not announced raises IndexError
    on a CPU (on a GPU: a device-side assertion), and never reads another token's row."""

    def __init__(self, whole: nn.Embedding, tokens: torch.Tensor) -> None:
        """tokens: (n,) int64 ids, each once; their rows are copied from `whole`."""
        padding = whole.padding_idx
        tokens = torch.unique(tokens if padding is None else torch.cat([tokens, tokens.new_tensor([padding])]))
        super().__init__(
            len(tokens),
            whole.embedding_dim,
            padding_idx=None if padding is None else int(torch.searchsorted(tokens, padding)),
            _weight=whole.weight.detach()[tokens].clone(),
        )
        row = torch.full((whole.num_embeddings,), len(tokens), dtype=torch.int64)  # out of range
        row[tokens] = torch.arange(len(tokens))
        self.register_buffer("row", row, persistent=False)
        self._tokens, self._initial = tokens, whole.weight.detach()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        row = self.get_buffer("row")
        return F.embedding(row[input], self.weight, self.padding_idx)

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the (vocabulary, D) weights with the (n, D) rows of the tokens in them; the others are as they
        were."""
        full = self._initial.to(rows.dtype, copy=True)
        full[self._tokens] = rows.to(full.device)
        return full


def keep_tokens(student: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Replaces the student's word embeddings by those of `tokens`, (n,) int64 ids. Not for a student with an MLM head,
    which scores every token."""
    whole = student.get_input_embeddings()
    assert isinstance(whole, nn.Embedding), type(whole)
    student.set_input_embeddings(CompactEmbedding(whole, tokens))


def whole_vocabulary(student: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `weights` by name, with those of a compact embedding written out again."""
    full = dict(weights)
    for name, module in student.named_modules():
        if isinstance(module, CompactEmbedding):
            full[f"{name}.weight"] = module.whole(weights[f"{name}.weight"])
    return full
