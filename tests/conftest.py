"""Shared fixtures: a tiny real teacher with its tokenizer and a tiny prepared corpus, made once per session."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Two threads on two busy cores wait for each other longer than they work; the tests' tensors are tiny anyway.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "the a small model learns from one large teacher layer map every token and not much else today".split()


@dataclass(frozen=True)
class TinyWorld:
    """teacher: 4 layers x 32, 4 heads. corpus: sequences of 16 tokens, some of them padded."""

    teacher: Path
    corpus: Path
    text: Path


def save_tiny_teacher(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz."
    vocab = {w: i for i, w in enumerate([*special, *WORDS, *letters, *(f"##{c}" for c in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(11)
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
            sentences = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))).capitalize() for _ in range(rng.randint(1, 3))]
            lines.append(". ".join(sentences) + ".")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    from engine.config import PrepareConfig, SourceConfig
    from engine.data.corpus import prepare

    root = tmp_path_factory.mktemp("tiny world")  # the space in its name is on purpose
    world = TinyWorld(root / "teacher", root / "corpus", root / "text.txt")
    save_tiny_teacher(world.teacher)
    write_text(world.text, 300)
    prepare(
        PrepareConfig(
            sources=[SourceConfig(path=str(world.text))],
            output_dir=str(world.corpus),
            tokenizer=str(world.teacher),
            seq_len=16,
            min_tokens=2,
            workers=1,
        )
    )
    return world
