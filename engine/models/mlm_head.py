"""The output matrix of a masked language model, kept apart from its inputs, so that logits need not exist all at
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.kernels.inputs import Head

Result = TypeVar("Result")


class MlmHead:
    """What a model's logits at P positions are made of. Call it with a function of a Head."""

    def __init__(self, hidden: torch.Tensor, decoder: nn.Linear) -> None:
        """hidden (P, D): what the output matrix is applied to."""
        self.hidden, self.decoder = hidden, decoder

    @property
    def positions(self) -> int:
        return len(self.hidden)

    def __call__(self, use: Callable[[Head], Result]) -> Result:
        """Returns what `use` makes of the Head, inside a call of the output matrix's module: ZeRO-3 gathers its weights
        for the time of that call."""
        decoder = self.decoder
        with _forward(decoder, lambda hidden: use(Head(hidden, decoder.weight, decoder.bias))):
            result: Result = decoder(self.hidden)
        return result

    def logits(self) -> torch.Tensor:
        """Returns the (P, V) logits."""
        return self(lambda head: head.logits(slice(None)))


class WholeLogits:
    """The logits of a model whose output matrix cannot be had on its own."""

    def __init__(self, logits: torch.Tensor) -> None:
        """logits (P, V)"""
        self._logits = logits

    @property
    def positions(self) -> int:
        return len(self._logits)

    def __call__(self, use: Callable[[torch.Tensor], Result]) -> Result:
        return use(self._logits)

    def logits(self) -> torch.Tensor:
        return self._logits


def output_matrix(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the module that turns hidden states into logits, if it is one matrix, and all that is done to them
    (`check_output_matrix`)."""
    decoder = model.get_output_embeddings()
    return decoder if isinstance(decoder, nn.Linear) and getattr(decoder, _IS_ALL, False) else None


_IS_ALL = "mapdistill_makes_the_logits"


def check_output_matrix(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Notes on the model whether the matrix applied to its inputs gives what the model gives; before anything is
    sharded.

    MobileBERT multiplies by the weights itself; others may scale or cap logits. ids: (1, L) int64.
    """
    decoder = model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        return
    logits = model(input_ids=ids).logits
    with without_output_matrix(decoder):
        inputs = model(input_ids=ids).logits
    same = inputs.shape[-1] == decoder.in_features and torch.allclose(
        decoder(inputs).float(), logits.float(), rtol=1e-3, atol=1e-3 * float(logits.abs().max())
    )
    setattr(decoder, _IS_ALL, same)


@contextmanager
def without_output_matrix(decoder: nn.Linear) -> Iterator[None]:
    """Makes the model's "logits" the inputs of the matrix, for the time of the context."""
    with _forward(decoder, lambda hidden: hidden):
        yield


@contextmanager
def _forward(module: nn.Module, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Gives a module another forward for the time of the context; its hooks stay."""
    assert "forward" not in vars(module)
    module.forward = function
    try:
        yield
    finally:
        del module.forward
