"""SQuAD v1.1 and v2: the official files and the hub's rows, and their questions as overlapping windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.errors import UserError
from engine.tasks.rows import Encoded, Ints
from engine.tasks.tables import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_QUESTION_TOKENS = 64
"""Tokens to which longer questions are cut, as in BERT's run_squad.py."""
CLS = 0
"""Position of the [CLS] token in every window: the span of "no answer"."""
_BATCH = 1000

Answers = list[tuple[int, str]]
Row = tuple[object, object, object, Answers | None]
"""id, question, context, answers; the first three are checked when they are collected."""


@dataclass(frozen=True)
class SquadSplit:
    name: str
    questions: list[str]
    contexts: list[str]
    answers: list[Answers] | None
    """(character at which it starts or -1, text) of each gold answer; [] = unanswerable. None: an unlabelled split."""
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Windows:
    """n windows of at most seq_len tokens, those of a question one after another: [CLS] question [SEP] part of the
    text [SEP], with the tokenizer's own special tokens."""

    encoded: Encoded
    """targets: (n, 2) int64 first and last token of the answer, counted in the window; (CLS, CLS) where the question
    has none or the window does not hold all of it; None for an unlabelled split."""
    example: Ints
    """(n,) ascending: the question, as its index in the split."""
    offsets: list[npt.NDArray[np.int32]]
    """Per window (L, 2): characters of the context that each token stands for; -1 where it is not of the context."""


def read_squad(path: Path, *, name: str, v2: bool) -> SquadSplit:
    """Reads one of the official JSON files; `v2` says which version the task wants.

    Answers are as they are written, wherever they stand. Raises UserError for a file that cannot be read, and one of
    another layout or the other version.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download the file again") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f'{path}: no "data" list at the top; give a file in the official SQuAD layout')
    version = str(content.get("version", ""))
    number = version.lstrip("v")
    if number.startswith("1" if v2 else "2"):
        wanted = "v2" if v2 else "v1.1"
        raise UserError(f"{path}: version {version!r}, but SQuAD {wanted} was asked for; give the other file or task")
    split = _collect(_official_rows(path, content["data"]), place=str(path), name=name)
    if not v2 and split.answers is not None and [] in split.answers:
        first = split.ids[split.answers.index([])]
        raise UserError(f"{path}: question {first!r} has no answer, which only SQuAD v2 allows; use the v2 task")
    return split


def squad_from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> SquadSplit:
    """Reads the hub's rows: id, question, context, and answers with the lists text and answer_start (absent:
    unlabelled). Raises UserError, naming the row, for others."""
    return _collect(_hub_rows(rows, name), place=name, name=name)


def _official_rows(path: Path, articles: list[Any]) -> Iterator[Row]:
    for number, article in enumerate(articles, 1):
        try:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers: Answers | None = None
                    if qa.get("is_impossible"):
                        answers = []
                    elif "answers" in qa:
                        answers = [_answer(answer.get("answer_start"), answer["text"]) for answer in qa["answers"]]
                    yield qa["id"], qa["question"], paragraph["context"], answers
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: article {number} is not in the official SQuAD layout ({error!r})") from error


def _hub_rows(rows: Iterable[Mapping[str, Any]], place: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        try:
            answers = row.get("answers")
            pairs = None
            if answers is not None:
                pairs = [_answer(at, t) for at, t in zip(answers["answer_start"], answers["text"], strict=True)]
            yield row["id"], row["question"], row["context"], pairs
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{place}: row {number} is not as in the hub's squad data sets ({error!r})") from error


def _answer(start: Any, text: Any) -> tuple[int, str]:
    """Returns an answer's position, -1 where it has none (scoring needs none), and text."""
    return -1 if start is None else int(start), "" if text is None else str(text)


def _collect(rows: Iterator[Row], *, place: str, name: str) -> SquadSplit:
    ids: dict[str, None] = {}
    questions: list[str] = []
    contexts: list[str] = []
    answers: list[Answers | None] = []
    for given, question, context, golds in rows:
        identity = str(given) if type(given) is int else given
        if not (isinstance(identity, str) and isinstance(question, str) and isinstance(context, str)):
            raise UserError(
                f"{place}: question {given!r}: question and context must be text, the id text or a whole number"
            )
        if identity in ids:
            raise UserError(f"{place}: two questions have the id {identity!r}; ids must differ")
        ids[identity] = None
        questions.append(question)
        contexts.append(context)
        answers.append(golds)
    if not ids:
        raise UserError(f"{place}: no question in it; give the official SQuAD file")
    labelled = [golds for golds in answers if golds is not None]
    if labelled and len(labelled) < len(answers):
        first = list(ids)[answers.index(None)]
        raise UserError(f"{place}: question {first!r} has no answers list, but others have; give all or none")
    return SquadSplit(name, questions, contexts, labelled or None, list(ids))


def encode_squad(split: SquadSplit, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, doc_stride: int) -> Windows:
    """Returns `split` as windows of at most `seq_len` tokens; two neighbours of one text start `doc_stride` tokens
    apart.

    The same windows as the tokenizer's own truncation="only_second" gives with an overlap (its `stride`) of the text's
    room less `doc_stride`; but each text is tokenized once, not once for each of its questions. Targets are those of
    the first gold answer. Raises UserError where windows would not overlap.
    """
    frame = _Frame.from_tokenizer(tokenizer)
    texts = {text: i for i, text in enumerate(dict.fromkeys(split.contexts))}
    text_ids, text_offsets = _tokenize(tokenizer, list(texts))
    text_of = np.array([texts[context] for context in split.contexts], np.int64)
    # Some questions of v2 begin with many spaces, which some tokenizers keep.
    whole_questions, _ = _tokenize(tokenizer, [question.lstrip() for question in split.questions])
    question_ids = [ids[:MAX_QUESTION_TOKENS] for ids in whole_questions]

    lengths = np.array([len(ids) for ids in text_ids], np.int64)[text_of]
    room = seq_len - frame.specials - np.array([len(ids) for ids in question_ids], np.int64)
    _check_room(split, room, lengths, seq_len=seq_len, doc_stride=doc_stride)
    counts = np.maximum(1, 1 - (room - lengths) // doc_stride)  # 1 + ceil((lengths - room) / doc_stride)
    example = np.repeat(np.arange(len(split), dtype=np.int64), counts)
    begin = (np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)) * doc_stride
    end = np.minimum(begin + room[example], lengths[example])

    sizes = frame.sizes(np.array([len(question_ids[i]) for i in example], np.int64), end - begin)
    starts = np.concatenate([[0], np.cumsum(sizes.sum(1))])
    head = sizes[:, :3].sum(1)  # tokens of a window before those of its text
    ids: list[npt.NDArray[np.int32]] = []
    flat_offsets = np.full((starts[-1], 2), -1, np.int32)
    for window, i in enumerate(example):
        part = slice(begin[window], end[window])
        ids += (frame.before, question_ids[i], frame.between, text_ids[text_of[i]][part], frame.after)
        at = starts[window] + head[window]
        flat_offsets[at : at + end[window] - begin[window]] = text_offsets[text_of[i]][part]

    targets = None
    if split.answers is not None:
        spans = [
            _token_span(text_offsets[text], golds[0]) if golds else (-1, -1)
            for text, golds in zip(text_of, split.answers, strict=True)
        ]
        span = np.array(spans, np.int64)[example]
        inside = (span[:, 0] >= begin) & (span[:, 1] < end)
        targets = np.where(inside[:, None], span + (head - begin)[:, None], CLS)
    types = None if frame.types is None else np.repeat(np.tile(frame.types, len(example)), sizes.ravel())
    encoded = Encoded(ids=np.concatenate(ids), starts=starts, types=types, targets=targets)
    views = [flat_offsets[a:b] for a, b in pairwise(starts)]
    return Windows(encoded, example, views)


@dataclass(frozen=True)
class _Frame:
    """The special tokens that a tokenizer puts around a pair of texts."""

    before: npt.NDArray[np.int32]
    between: npt.NDArray[np.int32]
    after: npt.NDArray[np.int32]
    types: npt.NDArray[np.int8] | None
    """(5,) token types: before, question, between, text, after."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> _Frame:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: SQuAD needs a fast tokenizer (one with a tokenizer.json)")
        pair = tokenizer("a", "a")
        ids = np.array(pair["input_ids"], np.int32)
        sequence = pair.sequence_ids(0)
        first, second = sequence.index(0), sequence.index(1)
        between, after = first + sequence.count(0), second + sequence.count(1)
        if first == 0:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer puts no special token first, which SQuAD needs for "
                '"no answer"; use an encoder such as BERT or XLM-R'
            )
        types = None
        if "token_type_ids" in pair:
            given = np.array(pair["token_type_ids"], np.int8)
            last = min(after, len(given) - 1)  # some tokenizers end without a special token
            types = given[[0, first, min(between, second), second, last]]
        return cls(ids[:first], ids[between:second], ids[after:], types)

    @property
    def specials(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def sizes(self, question: Ints, text: Ints) -> Ints:
        """Returns the (n, 5) tokens of each piece of n windows. question, text: (n,) tokens of these two."""
        before, between, after = (np.full_like(question, len(part)) for part in (self.before, self.between, self.after))
        return np.stack([before, question, between, text, after], axis=1)


def _check_room(split: SquadSplit, room: Ints, lengths: Ints, *, seq_len: int, doc_stride: int) -> None:
    worst = int(room.argmin())
    if room[worst] < 2:
        raise UserError(
            f"task.seq_len = {seq_len}: with question {split.ids[worst]!r} only {max(room[worst], 0)} tokens are left "
            f"for the text; set it to {seq_len - room[worst] + doc_stride + 1} or more"
        )
    tight = int(np.where(lengths > room, room, seq_len).argmin())  # a text in one window needs no overlap
    if lengths[tight] > room[tight] and doc_stride >= room[tight]:
        raise UserError(
            f"task.doc_stride = {doc_stride}: windows of one text would not overlap, since with task.seq_len = "
            f"{seq_len} and question {split.ids[tight]!r} they hold {room[tight]} tokens of it; set it to "
            f"{room[tight] - 1} or less"
        )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]]:
    """Returns for each text (L,) ids without special tokens, and (L, 2) first and past-the-last character of each
    token."""
    ids: list[npt.NDArray[np.int32]] = []
    offsets: list[npt.NDArray[np.int32]] = []
    for at in range(0, len(texts), _BATCH):
        # verbose=False: a text longer than the model takes is no news here.
        batch = tokenizer(
            list(texts[at : at + _BATCH]), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids += (np.array(row, np.int32) for row in batch["input_ids"])
        offsets += (np.array(row, np.int32).reshape(-1, 2) for row in batch["offset_mapping"])
    return ids, offsets


def _token_span(offsets: npt.NDArray[np.int32], answer: tuple[int, str]) -> tuple[int, int]:
    """Returns the first and last token that hold a character of the answer; (-1, -1) when none does (only dropped
    characters)."""
    start, text = answer
    # Several tokens may stand for one character (bytes of an emoji): the first and the last of them are taken.
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else (-1, -1)
