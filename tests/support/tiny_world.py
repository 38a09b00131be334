"""A tiny real teacher with its tokenizer, and text that it knows the words of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

WORDS = (
    "the", "a", "small", "model", "learns", "from", "one", "large", "teacher", "layer", "map", "every", "token", "and",
    "not", "much", "else", "today",
)  # fmt: skip


@dataclass(frozen=True)
class TinyWorld:
    """teacher: 4 layers x 32, 4 heads. corpus: sequences of 16 tokens, some of them padded."""

    teacher: Path
    corpus: Path
    text: Path


def save_tiny_teacher(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz."
    words = dict.fromkeys([*special, *WORDS, *letters, *(f"##{c}" for c in letters)])  # "a" is a word and a letter
    vocab = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(14)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that layers differ and attention is not flat
    )
    BertForMaskedLM(config).save_pretrained(folder)


def write_text(path: Path, documents: int, seed: int = 3) -> None:
    rng = random.Random(seed)
    lines = []
    for _ in range(documents):
        for _ in range(rng.randint(1, 4)):
            sentences = [
                " ".join(rng.choices(WORDS, k=rng.randint(2, 9))).capitalize() for _ in range(rng.randint(1, 3))
            ]
            lines.append(". ".join(sentences) + ".")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
