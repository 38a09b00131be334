"""Which models can be prepared for capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import (
    GPT2Config,
    GPT2Model,
    MptConfig,
    MptModel,
    PreTrainedModel,
    SqueezeBertConfig,
    SqueezeBertModel,
    XLMConfig,
    XLMModel,
)

from engine.errors import UserError
from engine.models.install import install


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16)), "left only"),
        (lambda: MptModel(MptConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=2)), "not attend to a later one"),
        (lambda: XLMModel(XLMConfig(vocab_size=60, emb_dim=16, n_layers=2, n_heads=2)), "its layers is unknown"),
        (
            lambda: SqueezeBertModel(
                SqueezeBertConfig(
                    vocab_size=60, hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=2
                )
            ),
            "does not call its layers",
        ),
    ],
    ids=["gpt2", "mpt", "xlm", "squeezebert"],
)
def test_models_that_cannot_be_captured_are_refused(model: Callable[[], PreTrainedModel], reason: str) -> None:
    with pytest.raises(UserError, match=rf"model type '(gpt2|mpt|xlm|squeezebert)'.* {reason}"):
        install(model(), "sdpa")
