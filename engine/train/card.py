"""The model card of an export: a README.md, whose front matter the hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from engine.hub.sentence import MODULES
from engine.models.hub import Head
from engine.models.projections import PROJECTIONS_FILE
from engine.records.columns import duration_text
from engine.records.comparison import Comparison
from engine.records.history import History
from engine.records.records import read_records
from engine.train.usage import snippet

CARD_TAG = "mapdistill"
TUNED = ("classification", "span")
"""Heads of fine-tuned models."""
PIPELINES: dict[Head, str] = {
    "none": "feature-extraction",
    "mlm": "fill-mask",
    "classification": "text-classification",
    "span": "question-answering",
}
"""Tasks by which the hub finds models, by head."""
BAR = "\\|"
"""A bar within a cell of a table."""
ABOUT_TUNED = """\
# Fine-tuned model

Trained with mapdistill (launch/finetune.py). The scores are those of the dev split, which may also \
have chosen checkpoints and hyper-parameters.
"""
ABOUT_STUDENT = """\
# Distilled student

Trained with mapdistill (layer-mapped distillation on DeepSpeed). The numbers describe the distillation; the model \
has not been scored on any task.
"""


def model_card(
    folder: Path,
    config: PretrainedConfig,
    description: dict[str, Any],
    history: History,
    comparison: Comparison | None,
) -> str:
    """Returns the README.md of an export.

    folder: that of the export, with its tokenizer. description: contents of EXPORT_FILE, and the step. history: of the
    training up to there. comparison: with the teacher, where it was measured.
    """
    head: Head = description["head"]
    parts = [f"---\n{_metadata(folder, description).to_yaml()}\n---\n", ABOUT_TUNED if head in TUNED else ABOUT_STUDENT]
    if (folder / "tokenizer.json").is_file():
        code = snippet(folder, config, head, pairs=description.get("pairs", False))
        parts.append(f"## Usage\n\n```python\n{code}```\n")
    if comparison is not None:
        parts.append(f"## Size and speed\n\n{_table(comparison.rows())}\n{comparison.conditions}\n")
    facts = {"optimizer step": description["step"], **description["card"], **_training(history)}
    parts.append(f"## How it was made\n\n{_table([('', ''), *((key, str(value)) for key, value in facts.items())])}")
    if history.steps:
        parts.append(f"## Losses\n\n{_table(_losses(history))}")
    if (folder / PROJECTIONS_FILE).is_file():
        parts.append(
            f"`{PROJECTIONS_FILE}` holds the training-only projections to the teacher's width; the model does not need "
            "it.\n"
        )
    return "\n".join(parts)


def is_card(text: str) -> bool:
    """Returns whether a README.md is the card of an export."""
    return f"- {CARD_TAG}\n" in text


def last_comparison(records: Path) -> Comparison | None:
    """Returns the comparison with the teacher in the last result of a run that has one; None where none has."""
    results = [record for record in read_records(records) if record["kind"] == "result"] if records.is_file() else []
    found = [record["comparison"] for record in results if record.get("comparison") is not None]
    return Comparison.from_record(found[-1]) if found else None


def _metadata(folder: Path, description: dict[str, Any]) -> ModelCardData:
    head: Head = description["head"]
    is_sentence_encoder = (folder / MODULES).is_file()
    licences = description.get("licences", [])  # older checkpoints have neither these nor a base model
    return ModelCardData(
        library_name="sentence-transformers" if is_sentence_encoder else "transformers",
        pipeline_tag="sentence-similarity" if is_sentence_encoder else PIPELINES[head],
        base_model=description.get("base_model"),
        license=licences[0] if len(licences) == 1 else licences or None,
        tags=[CARD_TAG] if head in TUNED else ["knowledge-distillation", CARD_TAG],
    )


def _training(history: History) -> dict[str, str]:
    if not history.steps:
        return {}
    seconds = sum(record["seconds"] for record in history.steps.values())
    speed = f"{history.tokens_per_s:,.0f} tokens/s, peak memory {history.peak_memory_gib:.2f} GiB"
    return {"time of training": f"{duration_text(seconds)}, {speed}"}


def _losses(history: History) -> list[tuple[str, str, str]]:
    """Returns name, first and last value of each loss, with their steps, below a head."""

    def row(name: str, first: tuple[float | None, int], last: tuple[float | None, int]) -> tuple[str, str, str]:
        before, after = (f"{_number(loss)} (step {step})" for loss, step in (first, last))
        return name, before, after

    first, last = history.first, history.last
    rows = [("loss", "first", "last"), row("total", (first["total"], first["step"]), (last["total"], last["step"]))]
    for name in (name for name in last["losses"] if name in first["losses"]):
        rows.append(row(name, (first["losses"][name], first["step"]), (last["losses"][name], last["step"])))
    if history.held_out is not None and history.first_held_out is not None:
        before, after = history.first_held_out, history.held_out
        rows.append(row("held out, total", (before["total"], before["step"]), (after["total"], after["step"])))
    return rows


def _number(loss: float | None) -> str:
    """Returns a loss as text. Records hold None for one that was not finite."""
    return "not finite" if loss is None else f"{loss:.4g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, the first row of which is its head."""
    lines = [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"
