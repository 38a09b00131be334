"""One vector for each text, as a model of sentence-transformers makes it; the mean of the last hidden states for other
models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from engine.errors import UserError
from engine.hub.sentence import SentenceEncoder
from engine.models.pooling import MEAN, pool

Role = Literal["text", "query", "document"]
PROMPTS: dict[Role, tuple[str, ...]] = {
    "text": (),
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Names of the prompts of each role, of which the first that a model has counts, as in encode_query and encode_document
of sentence-transformers; else its default prompt."""


class TextVectors:
    """Vectors up to their length, which no cosine sees."""

    def __init__(self, sentence: SentenceEncoder | None) -> None:
        """Reads the weights of Dense layers."""
        self._sentence = sentence
        dense = [] if sentence is None else sentence.dense
        self._dense = [(one.settings, load_file(one.weights)) for one in dense if one.weights is not None]

    @property
    def is_mean(self) -> bool:
        """Whether a vector is the mean of the last hidden states and nothing else"""
        return self._sentence is None or (self._sentence.pooling == MEAN and not self._dense)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that the model reads of a text; None: not said"""
        return None if self._sentence is None else self._sentence.max_seq_length

    def reads(self, text: str, role: Role) -> str:
        """Returns a text as the tokenizer gets it: with its prompt, in lower case where the model wants that.
        Raises UserError for a model that pools without its prompt."""
        if self._sentence is None:
            return text
        names = (*PROMPTS[role], self._sentence.default_prompt)
        prompt = next((self._sentence.prompts[name] for name in names if name in self._sentence.prompts), "")
        if prompt and self._sentence.modules[0].settings.get("include_prompt") is False:
            raise UserError(
                f"{self._sentence.modules[0].folder}/config.json has include_prompt: false, so the prompt {prompt!r} "
                "is no part of a vector, which is not understood here; remove the prompt, or the setting"
            )
        text = prompt + text
        return text.lower() if self._sentence.lower_case else text

    def __call__(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns the (B, V) float32 vectors of (B, L, D) last hidden states; attention_mask: (B, L), None: no pads.

        Dense layers, which are made for the width of the teacher, are left out for another one, as in an export.
        """
        vectors = pool(hidden, attention_mask, MEAN if self._sentence is None else self._sentence.pooling)
        if self._dense and self._dense[0][0]["in_features"] == vectors.shape[1]:
            for settings, weights in self._dense:
                on_device = {name: weight.to(vectors) for name, weight in weights.items()}
                vectors = linear(vectors, on_device["linear.weight"], on_device.get("linear.bias"))
                vectors = _activation(settings)(vectors)
        return vectors


def _activation(settings: dict[str, Any]) -> torch.nn.Module:
    name = settings.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    module: torch.nn.Module = getattr(torch.nn, name)()
    return module
