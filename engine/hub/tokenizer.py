"""Reading a tokenizer: that of a model folder, or a folder of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from engine.errors import UserError
from engine.hub.files import lookup, own_code_error, quiet, read_json, require_whole_files, unreadable
from engine.hub.sentence import encoder_folder

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "*.model")
"""What a tokenizer is made from where there is no tokenizer.json."""
SAMPLE = "The café: 123 東京 ☃"
"""Text on whose tokens readers of one tokenizer differ, with a character that few vocabularies have."""


def load_tokenizer(path: str, key: str) -> PreTrainedTokenizerFast:
    """Reads the tokenizer of a model folder or hub model; `key` names the setting in errors.

    Raises UserError for files that are not whole, for a missing package, and for a tokenizer without a fast version:
    preparation and tasks need the positions in the text that only a fast one has.
    """
    path = encoder_folder(path, key)
    require_whole_files(path, key, FILES)
    _require_fast_class(path, key)
    pieces: list[Path] = []
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        require_whole_files(path, key, VOCABULARIES)
        if not any(file.match(name) for file in folder.iterdir() for name in VOCABULARIES):
            raise _no_vocabulary_error(path, key)
        pieces = sorted(folder.glob("*.model"))
        _require_sentencepiece(pieces, key)
    try:
        with quiet():
            # False and not left out: transformers would ask on stdin whether to run a tokenizer's own code
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **lookup(path))
            if tokenizer.is_fast:
                tokenizer.backend_tokenizer.encode(SAMPLE)  # raises for a vocabulary without the unknown token
    except Exception as error:  # transformers raises nearly everything here, and tokenizers a bare Exception
        if pieces:  # it tries other readers in turn, and speaks of the last one
            raise UserError(f"{key}: {pieces[0]} is damaged, or not a SentencePiece model; copy it again") from None
        # until tokenizers > 0.23.3: a part of tokenizer.json whose type it does not know has no class of error
        if "untagged enum" in str(error):
            raise UserError(
                f"{key}={path!r}: tokenizers {tokenizers.__version__} cannot read its tokenizer.json, which a newer "
                "version wrote (pip install -U tokenizers transformers), or which is damaged"
            ) from None
        raise unreadable(path, key, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise _slow_tokenizer_error(path, key, type(tokenizer).__name__)
    # until transformers > 5.23: where there are no files it makes a tokenizer of special tokens alone
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_vocabulary_error(path, key)
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def reading_difference(tokenizer: PreTrainedTokenizerFast, path: str) -> str:
    """Returns how `tokenizer`, read from the folder `path`, differs from what its files say; nothing if it does not."""
    # until transformers > 5.23: many tokenizers are made anew by the rules of their class, and added tokens get the
    # next free ids
    file, added = Path(path) / "tokenizer.json", Path(path) / "added_tokens.json"
    if added.is_file():
        for word, index in read_json(added, path).items():
            read_id = tokenizer.convert_tokens_to_ids(word)
            if read_id != index:
                return f"added_tokens.json gives {word!r} the id {index}, but transformers reads it as {read_id}"
    if file.is_file():
        plain, read = _tokens(tokenizers.Tokenizer.from_file(str(file))), _tokens(tokenizer.backend_tokenizer)
        if read != plain:
            return (
                f"transformers reads {SAMPLE!r} as {read!r}, but its tokenizer.json says {plain!r}; if the file is "
                'right, write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json'
            )
    return ""


def _tokens(backend: Any) -> str:
    """Returns the tokens of the sample, without the pads that a file may ask for."""
    found = backend.encode(SAMPLE)
    return " ".join(token for token, real in zip(found.tokens, found.attention_mask, strict=True) if real)


def _no_vocabulary_error(path: str, key: str) -> UserError:
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings, key):
        return own_code_error(path, key, "tokenizer")
    return UserError(
        f"{key}={path!r}: no vocabulary there; add the tokenizer's files (tokenizer.json or vocab.txt) of the model "
        "that it was made from"
    )


def _require_fast_class(path: str, key: str) -> None:
    """Raises UserError for a class without a fast version, before it asks for a package (MeCab and others) that would
    not help."""
    file = Path(path) / "tokenizer_config.json"
    name = read_json(file, key).get("tokenizer_class") if file.is_file() else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is PreTrainedTokenizer and (Path(path) / "tokenizer.json").is_file():
        return  # transformers reads that file, whatever the general name
    if isinstance(found, type) and not issubclass(found, PreTrainedTokenizerFast):
        raise _slow_tokenizer_error(path, key, found.__name__)


def _require_sentencepiece(pieces: list[Path], key: str) -> None:
    if pieces and find_spec("sentencepiece") is None:
        raise UserError(
            f"{key}: {pieces[0]} is a SentencePiece model, and there is no tokenizer.json; to read it, "
            "pip install sentencepiece"
        )


def _slow_tokenizer_error(path: str, key: str, kind: str) -> UserError:
    return UserError(
        f"{key}={path!r}: {kind} has no fast version (tokenizer.json), which text and tasks need here; name a model "
        "with a fast tokenizer"
    )
