"""Which models can be prepared for capture."""

from __future__ import annotations

import pytest
from transformers import DebertaV2Config, DebertaV2Model, GPT2Config, GPT2Model, MPNetConfig, MPNetModel

from engine.errors import UserError
from engine.models.install import install


@pytest.mark.parametrize(
    "model",
    [
        lambda: MPNetModel(MPNetConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
        lambda: DebertaV2Model(
            DebertaV2Config(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
        lambda: GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    ],
    ids=["mpnet", "deberta-v2", "gpt2"],
)
def test_models_that_cannot_be_captured_are_refused(model: object) -> None:
    with pytest.raises(UserError, match=r"model type '(mpnet|deberta-v2|gpt2)'"):
        install(model(), "sdpa")  # type: ignore[operator]
