"""Reading a tokenizer: that of a model folder, or a folder of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import UserError
from engine.hub.files import not_readable, quiet, read_json, require_whole_files, where

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "*.model")
"""What a tokenizer is made from where there is no tokenizer.json."""


def load_tokenizer(path: str, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub model; `key` names the setting in errors. Raises UserError for files that
    are not whole, for a missing package, and for a tokenizer without a fast version: preparation and tasks need the
    positions in the text that only a fast one tells."""
    require_whole_files(path, key, FILES)
    pieces: list[Path] = []
    if not (Path(path) / "tokenizer.json").exists():
        _require_fast_class(path, key)
        require_whole_files(path, key, VOCABULARIES)
        pieces = sorted(Path(path).glob("*.model"))
        _require_sentencepiece(pieces, key)
    try:
        with quiet():
            # False and not left out: transformers would ask on stdin whether to run a tokenizer's own code
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where(path))
    except Exception as error:  # transformers raises nearly everything here, and tokenizers a bare Exception
        if pieces:  # it tries other readers in turn, and speaks of the last one
            raise UserError(f"{key}: {pieces[0]} is torn, or no SentencePiece model; copy it again") from None
        raise not_readable(path, key, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise _not_fast(path, key, type(tokenizer).__name__)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when there are no files
        raise UserError(f"{key}={path!r}: no vocabulary there; add the tokenizer's files (tokenizer.json or vocab.txt)")
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def _require_fast_class(path: str, key: str) -> None:
    """Before the class asks for a package (MeCab and others) that would not help."""
    file = Path(path) / "tokenizer_config.json"
    name = read_json(file, key).get("tokenizer_class") if file.is_file() else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and not issubclass(found, PreTrainedTokenizerFast):
        raise _not_fast(path, key, found.__name__)


def _require_sentencepiece(pieces: list[Path], key: str) -> None:
    if pieces and find_spec("sentencepiece") is None:
        raise UserError(
            f"{key}: {pieces[0]} is a SentencePiece model, and there is no tokenizer.json; to read it, "
            "pip install sentencepiece"
        )


def _not_fast(path: str, key: str, kind: str) -> UserError:
    return UserError(
        f"{key}={path!r}: {kind} has no fast version (tokenizer.json), which text and tasks need here; name a model "
        "with a fast tokenizer"
    )
