"""A small SQuAD in the official layout, of the words that the tiny tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_world import WORDS

_LONG_EVERY = 3


def write_squad_sample(folder: Path, *, v2: bool) -> None:
    """train-v1.1.json (36 questions) and dev-v1.1.json (18), or their v2.0 forms with one unanswerable question more
    for each of the 18 texts. Every third text has 90 to 120 words, the others 15 to 40; a question quotes the three
    words that stand before its answer, or before which it stands. Dev questions have three gold answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, texts, seed in (("train", 12, 5), ("dev", 6, 6)):
        rng = random.Random(seed)
        paragraphs = [_paragraph(rng, f"{part}-{i}", i, dev=part == "dev", v2=v2) for i in range(texts)]
        data = [{"title": f"Article {i}", "paragraphs": paragraphs[i : i + 2]} for i in range(0, texts, 2)]
        version, file = ("v2.0", f"{part}-v2.0.json") if v2 else ("1.1", f"{part}-v1.1.json")
        content = {"version": version, "data": data}
        (folder / file).write_text(json.dumps(content), encoding="utf-8")


def _paragraph(rng: random.Random, name: str, index: int, *, dev: bool, v2: bool) -> dict[str, Any]:
    length = rng.randint(90, 120) if index % _LONG_EVERY == 0 else rng.randint(15, 40)
    words = rng.choices(WORDS, k=length)
    # Texts end without a dot, so that the last answer stands at the very end.
    marks = ["." if rng.random() < 0.1 and i + 1 < length else "" for i in range(length)]
    context = " ".join(word + mark for word, mark in zip(words, marks, strict=True))
    begins = [0]
    for word, mark in zip(words, marks, strict=True):
        begins.append(begins[-1] + len(word + mark) + 1)

    def answer(first: int, count: int) -> dict[str, Any]:
        last = min(first + count, length) - 1
        begin = begins[first]
        return {"text": context[begin : begins[last] + len(words[last])], "answer_start": begin}

    places = {"start": 0, "middle": rng.randint(4, length - 6), "end": length - 2}
    qas: list[dict[str, Any]] = []
    for place, first in places.items():
        near = words[first - 3 : first] if first >= 3 else words[first + 2 : first + 5]
        golds = [answer(first, 2)] + ([answer(first, 1), answer(first, 2)] if dev else [])
        qas.append({"id": f"{name}-{place}", "question": f"what {' '.join(near)}?", "answers": golds})
        if v2:
            qas[-1]["is_impossible"] = False
    if v2:
        none: dict[str, Any] = {"id": f"{name}-none", "question": "what not not not not?", "answers": []}
        qas.append({**none, "is_impossible": True, "plausible_answers": [answer(places["middle"], 1)]})
    return {"context": context, "qas": qas}
