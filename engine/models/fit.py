"""What must fit together before a run starts: corpus, tokenizer and every model of a job, two by two.

CHECKS is the table; docs/checks.md is made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from engine.data.manifest import Manifest, check_tokenizer
from engine.errors import UserError
from engine.hub.config import ignored_settings
from engine.hub.tokenizer import load_tokenizer, reading_difference
from engine.models.hub import SavedModel, require_encoder, skeleton
from engine.models.install import install
from engine.models.student import new_model
from engine.models.teacher import truncated_config

SPECIAL = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
CASED_FROM = 0.05
"""Share of a vocabulary's words with capitals from which on it is one of cased text."""


@dataclass(frozen=True)
class Parts:
    """What a job puts together. A student that is made from the teacher's configuration fits where the teacher does."""

    tokenizer: PreTrainedTokenizerFast
    models: tuple[SavedModel, ...]
    """The first one is that of the tokenizer."""
    corpus: Manifest | None = None
    length: int | None = None
    """Tokens of the longest sequence; None: whatever the models take."""
    length_of: str = ""
    """Setting that asks for it, with its value, for messages."""


@dataclass(frozen=True)
class Check:
    between: tuple[str, str]
    compares: str
    otherwise: Literal["an error", "a note"]
    problems: Callable[[Parts], Iterable[str]]
    """A sentence for each; or it raises UserError itself."""


def check_fit(parts: Parts, checks: Iterable[Check] | None = None) -> list[str]:
    """Makes the checks (unset: all of the table). Returns the notes for the banner. Raises UserError for the first
    error."""
    notes = []
    for check in CHECKS if checks is None else checks:
        for problem in check.problems(parts):
            if check.otherwise == "an error":
                raise UserError(problem)
            notes.append(problem)
    return notes


def longest_input(config: PretrainedConfig) -> int | None:
    """Returns the most tokens that the model has positions for; None: no limit known. Tables of the RoBERTa family
    begin behind the index of the pad token."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    return positions - first_position(config)


def first_position(config: PretrainedConfig) -> int:
    """Returns the row of the first token in the table of positions: behind the pad token's, where that marks pads."""
    for name, module in skeleton(config, "none").named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _weights(parts: Parts) -> Iterable[str]:
    for model in parts.models:
        require_encoder(model.path, key=model.key, config=model.config)
    return ()


def _attention(parts: Parts) -> Iterator[str]:
    for model in parts.models:
        try:
            _probe(model.config)
        except UserError as error:
            yield f"{model}: {error}"


def _probe(config: PretrainedConfig) -> None:
    """Raises UserError for a model whose attention cannot be captured."""
    try:
        install(skeleton(config, "none"), "eager")
    except RuntimeError:  # its forward pass, or the proof, asks for values, which a model without storage has not
        install(new_model(truncated_config(config, 2), with_mlm_head=False, seed=0), "eager")


def _settings(parts: Parts) -> Iterator[str]:
    for model in parts.models:
        yield from ignored_settings(model.config, model.key)


def _corpus(parts: Parts) -> Iterable[str]:
    if parts.corpus is not None:
        check_tokenizer(parts.corpus, parts.tokenizer)
    return ()


def _words(parts: Parts) -> Iterator[str]:
    own, vocabulary = parts.models[0], parts.tokenizer.get_vocab()
    for model in parts.models[1:]:
        other = load_tokenizer(model.path, model.key).get_vocab()
        differing = [word for word, index in vocabulary.items() if other.get(word) != index]
        if differing:
            yield (
                f"{model} has another vocabulary than {own} ({len(other):,} and {len(vocabulary):,} tokens, e.g. "
                f"{differing[0]!r}): both must read the same token ids; name a model with the same tokenizer"
            )


def _rows(parts: Parts) -> Iterator[str]:
    largest = max(parts.tokenizer.get_vocab().values())
    for model in parts.models:
        if largest >= model.config.vocab_size:
            yield (
                f"{model} has embeddings for {model.config.vocab_size:,} tokens, but the tokenizer gives ids up to "
                f"{largest:,}: the first text with such a token would crash the run; remove the added tokens from the "
                "tokenizer, or resize the model (resize_token_embeddings) and save it"
            )


def _pad(parts: Parts) -> Iterator[str]:
    pad = parts.tokenizer.pad_token_id
    for model in parts.models:
        first = first_position(model.config)
        if first and pad is not None and pad != first - 1:
            yield (
                f"{model} counts positions from pad_token_id={first - 1} of its config.json, but the tokenizer pads "
                f"with {pad}: padding and text would get wrong positions; set pad_token_id to {pad}"
            )


def _special(parts: Parts) -> Iterator[str]:
    for model in parts.models:
        for name in SPECIAL:
            own, given = getattr(model.config, name, None), getattr(parts.tokenizer, name)
            if own is not None and given is not None and own != given:
                yield f"{model}: config.json says {name}={own}, but the tokenizer's is {given}"


def _length(parts: Parts) -> Iterator[str]:
    for model in parts.models:
        longest = longest_input(model.config)
        if longest is not None and parts.length is not None and parts.length > longest:
            yield f"{parts.length_of}, but {model} takes {longest} tokens at most; use seq_len={longest} or less"


def _reading(parts: Parts) -> Iterator[str]:
    own = parts.models[0]
    if difference := reading_difference(parts.tokenizer, own.path):
        yield f"{own}: {difference}"


def _casing(parts: Parts) -> Iterator[str]:
    tokenizer, model = parts.tokenizer, parts.models[0]
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    capitals = sum(word != word.lower() for word in words)
    normalizer = tokenizer.backend_tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str("Aa") == "aa"
    has_setting = getattr(tokenizer, "do_lower_case", None) is not None
    setting = "do_lower_case in tokenizer_config.json" if has_setting else "the normalizer in tokenizer.json"
    if lowers and capitals > CASED_FROM * len(words):
        yield (
            f"{model}: {capitals:,} of the {len(words):,} tokens of its vocabulary have capitals, but its tokenizer "
            f"makes all text lower case, so none of them is ever used; correct {setting} if the model was trained "
            "on cased text"
        )
    unknown = tokenizer.unk_token
    if not lowers and not capitals and unknown in tokenizer.tokenize("The Model"):
        yield (
            f"{model}: its vocabulary has no capitals, but its tokenizer leaves them in the text: such words become "
            f"{unknown}; correct {setting} if the model was trained on lower case"
        )


EACH_AND_TOKENIZER = ("each model", "tokenizer")
CHECKS = (
    Check(("config.json", "weights"), "names and shapes of all tensors of the encoder", "an error", _weights),
    Check(
        ("config.json", "attention"),
        "whether a forward pass shows its layers and their attention",
        "an error",
        _attention,
    ),
    Check(("config.json", "transformers"), "settings that this version does not know", "a note", _settings),
    Check(("corpus", "tokenizer"), "how text becomes ids, by a hash", "an error", _corpus),
    Check(("each further model", "tokenizer"), "its own vocabulary: ids must mean the same words", "an error", _words),
    Check(EACH_AND_TOKENIZER, "rows of the embeddings and the largest id", "an error", _rows),
    Check(EACH_AND_TOKENIZER, "the pad id, where positions are counted from it", "an error", _pad),
    Check(EACH_AND_TOKENIZER, "the ids of pad, cls, sep and mask", "a note", _special),
    Check(("each model", "sequence length"), "the tokens that its positions allow", "an error", _length),
    Check(("tokenizer", "its files"), "ids of added tokens, and the tokens of a sample", "a note", _reading),
    Check(("tokenizer", "its vocabulary"), "lower case against capitals", "a note", _casing),
)
