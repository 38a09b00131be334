"""Prediction files in the layout that the GLUE server takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.task_specs import TaskSpec


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
