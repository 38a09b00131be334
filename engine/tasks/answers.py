"""Gold answers of SQuAD: whether they stand in their texts where they should."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from engine.errors import UserError
from engine.tasks.squad import Answers, SquadSplit


def learnable_answers(split: SquadSplit, source: str, *, leave_out: bool) -> tuple[SquadSplit, list[str]]:
    """Returns a training split with those answers alone that stand at their answer_start, and remarks.

    Questions that have answers but none of them at its place are left out and counted with `leave_out`; otherwise one
    raises UserError.
    """
    assert split.answers is not None, source
    standing = [
        [(start, text) for start, text in golds if text and start >= 0 and context.startswith(text, start)]
        for context, golds in zip(split.contexts, split.answers, strict=True)
    ]
    lost = {row for row, golds in enumerate(split.answers) if golds and not standing[row]}
    kept = [row for row in range(len(split)) if row not in lost]
    remarks = []
    if lost:
        row = min(lost)
        found = f"{len(lost):,} of {len(split):,} questions have no answer at their answer_start"
        if not leave_out or not kept:
            raise UserError(
                f"{source}: question {split.ids[row]!r}: {_problem(split.contexts[row], split.answers[row])}; {found}; "
                "repair the file, or write task.unlabelled=leave_out to train without these questions"
            )
        remarks = [f"{source}: {found} (first {split.ids[row]!r}) and are left out"]
    learned = replace(
        split,
        questions=[split.questions[row] for row in kept],
        contexts=[split.contexts[row] for row in kept],
        answers=[standing[row] for row in kept],
        ids=[split.ids[row] for row in kept],
    )
    return learned, remarks


def _problem(context: str, golds: Answers) -> str:
    start, text = golds[0]
    if not text:
        return "has an empty answer (an unanswerable question has none)"
    if text in context:
        hint = f"it stands at {context.find(text)}"
    elif _plain(text) in _plain(context):
        hint = "it stands there in another case or Unicode form"
    else:
        hint = "it does not occur in the context"
    return f"answer {text!r} does not stand at answer_start {start} ({hint})"


def scored_remarks(split: SquadSplit, source: str) -> list[str]:
    """Returns what is odd about answers that are scored against, which need no position."""
    assert split.answers is not None, source
    rows = list(zip(split.contexts, split.answers, strict=True))
    empty = sum(bool(golds) and not any(text for _, text in golds) for _, golds in rows)
    odd = sum(
        any(text for _, text in golds) and not any(text and text.casefold() in context.casefold() for _, text in golds)
        for context, golds in rows
    )
    remarks = []
    if empty:
        remarks.append(f"{source}: questions with an empty answer, which count as unanswerable: {empty:,}")
    if odd:
        remarks.append(
            f"{source}: questions whose answers do not occur in their text as written (other Unicode form, other "
            f"words), so that no prediction can be exactly right: {odd:,}"
        )
    return remarks


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
