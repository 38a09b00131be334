"""Small real tokenizers of four families, trained on the spot, and text for them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DebertaV2Tokenizer, PreTrainedTokenizerFast

WORDS = [
    "the", "of", "and", "in", "to", "was", "is", "for", "as", "on", "with", "by", "at", "from", "that", "his", "it",
    "an", "were", "are", "which", "this", "also", "be", "had", "first", "one", "their", "school", "government",
    "language", "university", "history", "northern", "temperature", "engineering", "river", "mountain",
    "unbelievable", "running", "walked", "carefully", "international", "development", "population", "electricity",
    "music", "theatre", "championship",
]  # fmt: skip


def make_text(*, documents: int, seed: int = 0, paragraphs: int = 4, sentences: int = 5) -> str:
    """Documents of paragraphs (a line each) with an empty line between documents."""
    rng = random.Random(seed)

    def sentence() -> str:
        words = rng.choices(WORDS, k=rng.randint(4, 18))
        return " ".join(words).capitalize() + rng.choice(".!?")

    return "\n\n".join(
        "\n".join(
            " ".join(sentence() for _ in range(rng.randint(1, sentences))) for _ in range(rng.randint(1, paragraphs))
        )
        for _ in range(documents)
    )


@cache
def _sample() -> list[str]:
    return make_text(documents=60, seed=99).splitlines()


@cache
def bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_sample(), trainers.WordPieceTrainer(vocab_size=160, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )


def _roberta_names() -> dict[str, str]:
    return {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }


@cache
def roberta() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_sample(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_roberta_names())


@cache
def xlm_r() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(_sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_roberta_names())


@cache
def deberta_v3() -> PreTrainedTokenizerFast:
    """SentencePiece's pieces in the class of transformers, as microsoft/deberta-v3-base has them."""
    pieces = json.loads(xlm_r().backend_tokenizer.to_str())["model"]["vocab"]
    special = [(token, 0.0) for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    plain = [(piece, score) for piece, score in pieces if not piece.startswith("<")]
    return DebertaV2Tokenizer(vocab=[*special, *plain, ("[MASK]", 0.0)], unk_id=3)


FAMILIES = {"bert": bert, "roberta": roberta, "xlm_r": xlm_r, "deberta_v3": deberta_v3}


def saved(family: str, folder: Path) -> str:
    """The folder that holds the tokenizer of `family`, as a model folder would."""
    path = folder / f"tokenizer-{family}"
    FAMILIES[family]().save_pretrained(str(path))
    return str(path)
