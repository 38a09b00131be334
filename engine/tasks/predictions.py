"""Answers and files of a model's outputs: decoding and metrics of SQuAD, its predictions, GLUE's submission."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.tasks.specs import TaskSpec
from engine.tasks.squad import CLS, SquadSplit, Windows

Floats = npt.NDArray[np.float32]


def decode(
    windows: Windows,
    split: SquadSplit,
    start_logits: Sequence[npt.NDArray[np.floating]],
    end_logits: Sequence[npt.NDArray[np.floating]],
    *,
    v2: bool,
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> dict[str, str]:
    """Returns the answer's text by question id, as Hugging Face's run_qa.py chooses it.

    A span's score is the sum of its two logits; the best one over all windows wins, among the `n_best` first and last
    tokens of each window. With `v2` the answer is "" (none) where the least score of CLS over the windows is higher.
    Logits: per window (L,), of the real tokens only. "" as well where no span is possible.
    """
    assert len(start_logits) == len(end_logits) == len(windows.offsets), "one row of logits per window"
    none = np.full(len(split), np.inf, np.float32)
    best = np.full(len(split), -np.inf, np.float32)
    texts = [""] * len(split)
    for example, offsets, starts, ends in zip(windows.example, windows.offsets, start_logits, end_logits, strict=True):
        assert len(starts) == len(ends) == len(offsets), "logits of the real tokens only"
        start, end = np.asarray(starts, np.float32), np.asarray(ends, np.float32)
        none[example] = min(none[example], start[CLS] + end[CLS])
        score, first, last = _best_span(start, end, offsets, n_best=n_best, max_tokens=max_answer_tokens)
        if score > best[example]:
            best[example] = score
            # Tokens of sentencepiece include the space before the word.
            texts[example] = split.contexts[example][offsets[first, 0] : offsets[last, 1]].strip()
    if v2:
        texts = ["" if no_answer else text for text, no_answer in zip(texts, none > best, strict=True)]
    return dict(zip(split.ids, texts, strict=True))


def _best_span(
    start: Floats, end: Floats, offsets: npt.NDArray[np.int32], *, n_best: int, max_tokens: int
) -> tuple[float, int, int]:
    """Returns score, first and last token of the best span of the text; -inf when there is none."""
    first, last = _largest(start, n_best)[:, None], _largest(end, n_best)[None]
    # The last comparison is false where `last` is not of the text, or no character is between the two.
    allowed = (last >= first) & (last < first + max_tokens)
    allowed &= (offsets[first, 0] >= 0) & (offsets[last, 1] > offsets[first, 0])
    scores = np.where(allowed, start[first] + end[last], -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[row, column]), int(first[row, 0]), int(last[0, column])


def _largest(values: Floats, count: int) -> npt.NDArray[np.intp]:
    return np.argpartition(values, -count)[-count:] if count < len(values) else np.arange(len(values))


def squad_metrics(split: SquadSplit, predictions: Mapping[str, str]) -> dict[str, float]:
    """Returns exact_match and f1 in [0, 1], as the official script counts them: the best over a question's gold
    answers, of which empty ones do not count; "" is right for an unanswerable one. Every question of the labelled
    `split` has a prediction."""
    from torchmetrics.functional.text import squad

    assert split.answers is not None, f"{split.name} is unlabelled"
    given = [{"id": key, "prediction_text": predictions[key]} for key in split.ids]
    wanted: list[dict[str, Any]] = [
        {"id": key, "answers": {"answer_start": [0], "text": [text for _, text in golds if text] or [""]}}
        for key, golds in zip(split.ids, split.answers, strict=True)
    ]
    return {name: float(value) / 100 for name, value in squad(given, wanted).items()}


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """Writes the file that the official evaluation reads: one JSON object, question id -> text. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(predictions), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_submission(
    folder: Path, spec: TaskSpec, split_name: str, ids: Sequence[str], outputs: npt.NDArray[Any]
) -> Path:
    """Writes the predictions of one dev or test split of a classification or regression into `folder`, which is made.

    `outputs`: (n, labels) finite logits, or (n,) or (n, 1) predictions, in the order of `ids`. The file is named as the
    server wants it (SST-2.tsv, MNLI-m.tsv …; NAME.tsv for a custom task); both splits have one name, so give the dev
    split a folder of its own. Header `index`, `prediction`; labels as the task's files write them (names for MNLI,
    QNLI and RTE, 0 and 1 elsewhere); regressions with 3 decimals (custom: 6 digits), STS-B clipped to 0..5.
    """
    assert spec.kind != "span", spec.name
    assert len(ids) == len(outputs), (len(ids), len(outputs))
    assert np.isfinite(outputs).all(), f"{spec.name}: predictions of a diverged model"
    splits = spec.dev_splits if split_name in spec.dev_splits else spec.test_splits
    path = folder / spec.submission[splits.index(split_name)]
    if spec.kind == "classification":
        predictions = [spec.labels[label] for label in outputs.argmax(1)]
    elif spec.target_range is not None:
        predictions = [f"{value:.3f}" for value in outputs.reshape(len(ids)).clip(*spec.target_range)]
    else:
        predictions = [f"{value:.6g}" for value in outputs.reshape(len(ids))]
    rows = "".join(f"{index}\t{prediction}\n" for index, prediction in zip(ids, predictions, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"index\tprediction\n{rows}", encoding="utf-8", newline="\n")
    return path
