"""Masking for the MLM loss, on the fly: 80 % mask token, 10 % random token, 10 % kept (BERT's rule)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.kernels.inputs import UNSCORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskingTables:
    mask_id: int
    special: Bools
    """(vocab,) ids that are never chosen."""
    ordinary: Ints
    """(n,) all other ids of the vocabulary: what a random token is drawn from."""
    continuation: Bools | None
    """(vocab,) ids that go on with the word of the token before; None when the tokenizer does not mark words."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> MaskingTables:
        """Reads the tables from a tokenizer. Raises UserError when it has no mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"data.mlm_probability: the tokenizer {tokenizer.name_or_path!r} has no mask token; set it to 0, or "
                "use a teacher with one"
            )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        special = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        special[tokenizer.all_special_ids] = True
        used = np.zeros_like(special)
        used[list(vocabulary.values())] = True
        return cls(
            mask_id=tokenizer.mask_token_id,
            special=special,
            ordinary=np.flatnonzero(used & ~special),
            continuation=_continuations(tokenizer, vocabulary, len(special)),
        )


def _continuations(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], size: int) -> Bools | None:
    backend = tokenizer.backend_tokenizer
    # the parts that mark words, without the vocabulary (which may hold any text)
    steps = "".join(str(step) for step in (backend.normalizer, backend.pre_tokenizer, backend.decoder))
    prefix = getattr(backend.model, "continuing_subword_prefix", None)
    if type(backend.model).__name__ == "WordPiece" and prefix:
        goes_on = [token.startswith(prefix) for token in vocabulary]
    elif "ByteLevel" in steps:
        goes_on = [not token.startswith("Ġ") for token in vocabulary]
    elif "Metaspace" in steps or "▁" in steps:
        goes_on = [not token.startswith("▁") for token in vocabulary]
    else:
        return None
    table = np.zeros(size, dtype=bool)
    table[list(vocabulary.values())] = goes_on
    return table


def mask_tokens(
    input_ids: Ints,
    attention_mask: Ints | None,
    sample_ids: Sequence[int] | Ints,
    *,
    probability: float,
    whole_word: bool,
    tables: MaskingTables,
    seed: int,
) -> tuple[Ints, Ints]:
    """Returns masked ids (B, L) and labels (the original id where chosen, UNSCORED_LABEL elsewhere); the input is not
    changed.

    Each token (with `whole_word`: word) is chosen with `probability`; special and padded ones never are; a sequence
    with anything to choose has at least one chosen. What happens to a row depends only on its real tokens, `seed`, and
    its sample id, so never on its neighbours or on padding.
    """
    if whole_word and tables.continuation is None:
        raise UserError("data.whole_word_mask=True: this tokenizer does not mark where words begin; set it to false")
    ids = input_ids.copy()
    labels = np.full_like(ids, UNSCORED_LABEL)
    lengths = [ids.shape[1]] * len(ids) if attention_mask is None else attention_mask.sum(axis=1)
    for row, (length, sample) in enumerate(zip(lengths, sample_ids, strict=True)):
        original = input_ids[row, :length]
        eligible = ~tables.special[original]
        if not eligible.any():
            continue
        begins = eligible.copy()
        if whole_word and tables.continuation is not None:
            begins[1:] &= ~(tables.continuation[original[1:]] & eligible[:-1])
        word = np.cumsum(begins) - 1  # of each eligible token
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)))
        scores = rng.random(int(begins.sum()))
        chosen_words = scores < probability
        chosen_words[np.argmin(scores)] = True
        chosen = np.flatnonzero(eligible & chosen_words[np.maximum(word, 0)])
        fate = rng.random(len(chosen))
        random_ids = tables.ordinary[rng.integers(len(tables.ordinary), size=len(chosen))]
        labels[row, chosen] = original[chosen]
        ids[row, chosen] = np.where(fate < 0.8, tables.mask_id, np.where(fate < 0.9, random_ids, original[chosen]))
    return ids, labels
