"""Packed token sequences of text: sentences, token units, special tokens. No torch and no transformers here: every
worker process imports this."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import UserError

Tokens = npt.NDArray[np.int32]

# A sentence ends after . ! ? … (or a full-width mark), with closing quotes or brackets; the marks of scripts that
# put no space between sentences need none.
_END = re.compile(r"""[.!?…؟।]["'”’»)\]]*\s+|[。！？]["'”’」』）]*\s*""")
_OPENING = "\"'“‘«([¿¡「『（"
_BLOCK = 8192
"""Characters that are tokenised at once: bounds memory and time for a line of any length."""
_BATCH = 1 << 18
"""Characters given to the tokenizer in one call."""


def sentence_starts(text: str) -> list[int]:
    """Returns where the sentences after the first one start. A new one starts behind an end mark when an opening quote
    or bracket, a digit, or a letter that is not lower case follows. Abbreviations ("Dr. Who") are cut too."""
    return [
        start
        for match in _END.finditer(text)
        if (start := match.end()) < len(text)
        and (text[start] in _OPENING or (text[start].isalnum() and not text[start].islower()))
    ]


class Block(NamedTuple):
    text: str
    starts: list[int]
    """Positions in the text where a sentence starts, other than the one that opens the block."""
    opens: bool
    """Whether the block opens a sentence; False: it goes on with the one before."""


def blocks(text: str) -> list[Block]:
    """Cuts a paragraph into blocks of at most about _BLOCK characters: at sentences, else at white space, else
    anywhere. White space at a cut opens the next block, so that byte-level and SentencePiece tokenizers still see a
    word with a space in front."""
    starts = sentence_starts(text)
    if len(text) <= _BLOCK:
        return [Block(text, starts, True)]
    cuts = [(0, 0, True)]  # where the block begins, the sentence start it accounts for, whether it opens a sentence
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        if end - cuts[-1][0] > _BLOCK and start > cuts[-1][1]:
            lead = start
            while text[lead - 1].isspace():
                lead -= 1
            cuts.append((lead, start, True))
        while end - cuts[-1][1] > _BLOCK:
            at = cuts[-1][1]
            space = text.rfind(" ", at + 1, at + _BLOCK)
            cut = space if space > 0 else at + _BLOCK
            cuts.append((cut, cut, False))
    ends = [cut for cut, _, _ in cuts[1:]] + [len(text)]
    return [
        Block(text[cut:end], [s - cut for s in starts[bisect_right(starts, start) : bisect_left(starts, end)]], opens)
        for (cut, start, opens), end in zip(cuts, ends, strict=True)
    ]


@dataclass(frozen=True)
class SpecialTokens:
    """What the tokenizer puts around one text ([CLS] x [SEP], <s> x </s>), and between two documents."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int | None
    reserved: tuple[int, ...] = ()
    """Ids that text must never become: all special tokens but `unknown`."""
    unknown: int | None = None


def special_tokens(
    backend: Any, separator: int | None, *, reserved: Iterable[int] = (), unknown: int | None = None
) -> SpecialTokens:
    """Learns prefix and suffix from the tokenizer itself: encodes a word with and without special tokens."""
    for word in ("a", "1", "the", "。"):
        plain = backend.encode(word, add_special_tokens=False).ids
        whole = backend.encode(word, add_special_tokens=True).ids
        for at in range(len(whole) - len(plain) + 1):
            if plain and whole[at : at + len(plain)] == plain:
                around = tuple(whole[:at]), tuple(whole[at + len(plain) :])
                return SpecialTokens(*around, separator, tuple(sorted(set(reserved) - {unknown})), unknown)
    raise UserError("tokenizer: cannot tell which special tokens it adds around a text; is it an encoder's tokenizer?")


def tokenize(backend: Any, documents: Sequence[Sequence[str]], special: SpecialTokens) -> Iterator[list[list[Tokens]]]:
    """Yields each document as paragraphs of sentences of (n,) int32 ids, without special tokens.

    A paragraph is tokenised as a whole (in blocks, when it is very long) and its ids are then divided, so that they
    are those of the running text. A reserved id becomes the unknown token.
    """
    # until tokenizers > 0.23.3: a Unigram model takes "</s>" in a text for its piece of that name, whatever
    # encode_special_tokens says
    reserved = np.zeros(max(special.reserved, default=0) + 1, dtype=bool)
    reserved[list(special.reserved)] = True

    def clean(ids: Tokens) -> Tokens:
        hit = np.take(reserved, ids, mode="clip") & (ids < len(reserved))
        if special.unknown is not None and hit.any():
            ids[hit] = special.unknown
        return ids

    for _, document in groupby(_encoded_blocks(backend, documents), key=itemgetter(0)):
        yield [
            _sentences(
                (block, clean(np.array(encoding.ids, dtype=np.int32)), encoding) for _, _, block, encoding in paragraph
            )
            for _, paragraph in groupby(document, key=itemgetter(1))
        ]


def _encoded_blocks(backend: Any, documents: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, Block, Any]]:
    """Yields (document, paragraph, block, encoding), encoded _BATCH characters at a time however large a document
    is."""
    waiting: list[tuple[int, int, Block]] = []
    size = 0

    def encode() -> Iterator[tuple[int, int, Block, Any]]:
        encodings = backend.encode_batch([block.text for _, _, block in waiting], add_special_tokens=False)
        for (document, paragraph, block), encoding in zip(waiting, encodings, strict=True):
            yield document, paragraph, block, encoding
        waiting.clear()

    for document, paragraphs in enumerate(documents):
        for paragraph, text in enumerate(paragraphs):
            for block in blocks(text):
                waiting.append((document, paragraph, block))
                size += len(block.text)
                if size >= _BATCH:
                    yield from encode()
                    size = 0
    yield from encode()


def _sentences(encoded: Iterable[tuple[Block, Tokens, Any]]) -> list[Tokens]:
    sentences: list[Tokens] = []
    for block, ids, encoding in encoded:
        cuts = [0]
        for start in block.starts:
            token = _token_at(encoding, start, len(block.text))
            if token is not None and token > cuts[-1]:
                cuts.append(token)
        pieces = [ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
        if sentences and not block.opens:
            sentences[-1] = np.concatenate([sentences[-1], pieces.pop(0)])
        sentences += pieces
    return [sentence for sentence in sentences if len(sentence)]


def _token_at(encoding: Any, start: int, end: int) -> int | None:
    """Returns the token of the character at `start`, or of one of the next few: normalisation may have removed it."""
    for position in range(start, min(start + 8, end)):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


class Packer:
    """Sequences of at most `capacity` text tokens (special tokens around them not counted), filled with documents.

    A unit that does not fit opens a new sequence; one longer than a whole sequence is divided: a paragraph into
    sentences, a sentence into token runs. With pack=unit each unit is a sequence of its own, cut at `capacity`.
    `sequences` collects the finished ones, `dropped` counts those with fewer than `min_tokens` text tokens (separators
    are not text), and `cut` the units that were cut.
    """

    def __init__(
        self,
        *,
        capacity: int,
        pack: str,
        unit: str,
        separator: int | None,
        short_seq_prob: float = 0.0,
        min_tokens: int = 1,
        rng: np.random.Generator,
    ) -> None:
        self._capacity, self._pack, self._unit, self._min_tokens = capacity, pack, unit, min_tokens
        self._separator = None if separator is None else np.array([separator], dtype=np.int32)
        self._short_seq_prob, self._rng = short_seq_prob, rng
        self.sequences: list[Tokens] = []
        self.dropped = self.cut = 0
        self._new_document = False
        self._open()

    def add_document(self, paragraphs: Sequence[Sequence[Tokens]]) -> None:
        if self._pack == "unit":
            self._add_units(paragraphs)
            return
        if self._pack == "document":
            self.finish()
        self._new_document = True
        for paragraph in paragraphs:
            if self._unit == "paragraph" and sum(map(len, paragraph)) <= self._capacity:
                if paragraph:
                    self._add_whole(np.concatenate(paragraph))
                continue
            for sentence in paragraph:
                if self._unit == "token" or len(sentence) > self._capacity:
                    self._add_run(sentence)
                else:
                    self._add_whole(sentence)

    def _add_units(self, paragraphs: Sequence[Sequence[Tokens]]) -> None:
        for paragraph in filter(None, paragraphs):
            for unit in [np.concatenate(paragraph)] if self._unit == "paragraph" else paragraph:
                self.cut += len(unit) > self._capacity
                self._append(unit[: self._capacity])
                self.finish()

    def finish(self) -> None:
        """Ends the sequence at hand. Call it once more after the last document."""
        if self._pieces:
            if self._length - self._separators >= self._min_tokens:
                self.sequences.append(np.concatenate(self._pieces))
            else:
                self.dropped += 1
        self._open()

    def _open(self) -> None:
        self._pieces: list[Tokens] = []
        self._length = self._separators = 0
        self._target = self._capacity
        if self._short_seq_prob > 0 and self._rng.random() < self._short_seq_prob:
            lowest = min(max(2, self._min_tokens), self._capacity)  # a shorter aim would only be dropped
            self._target = int(self._rng.integers(lowest, self._capacity + 1))

    def _gap(self) -> int:
        return int(self._new_document and self._separator is not None and self._length > 0)

    def _append(self, tokens: Tokens) -> None:
        self._pieces.append(tokens)
        self._length += len(tokens)

    def _separate(self) -> None:
        if self._gap():
            assert self._separator is not None
            self._append(self._separator)
            self._separators += 1
        self._new_document = False

    def _add_whole(self, tokens: Tokens) -> None:
        # an empty sequence takes any whole unit, also one longer than a short aim
        if self._length and self._length + self._gap() + len(tokens) > self._target:
            self.finish()
        self._separate()
        self._append(tokens)

    def _add_run(self, tokens: Tokens) -> None:
        while len(tokens):
            # unit=token keeps sequences exactly full, even with a separator at the end; elsewhere it would be wasted
            if self._length + (self._gap() if self._unit != "token" else 0) >= self._target:
                self.finish()
            self._separate()
            room = max(0, self._target - self._length)
            if room:
                self._append(tokens[:room])
            tokens = tokens[room:]
