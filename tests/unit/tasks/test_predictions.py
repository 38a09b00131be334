"""Prediction files, line by line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.tasks.predictions import write_submission
from engine.tasks.specs import BUILT_IN, task_spec

LOGITS = np.array([[0.0, 1.0], [3.0, -3.0]], np.float32)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("CoLA", ["1", "0"]),
        ("SST-2", ["1", "0"]),
        ("MRPC", ["1", "0"]),
        ("QQP", ["1", "0"]),
        ("WNLI", ["1", "0"]),
        ("QNLI", ["not_entailment", "entailment"]),
        ("RTE", ["not_entailment", "entailment"]),
    ],
)
def test_classifications(tmp_path: Path, task: str, labels: list[str]) -> None:
    path = write_submission(tmp_path / "new" / "dev", BUILT_IN[task], "dev", ["7", "x 9"], LOGITS)
    assert path == tmp_path / "new" / "dev" / f"{task}.tsv"
    assert path.read_bytes() == f"index\tprediction\n7\t{labels[0]}\nx 9\t{labels[1]}\n".encode()
    assert write_submission(tmp_path, BUILT_IN[task], "test", ["7", "x 9"], LOGITS) == tmp_path / f"{task}.tsv"


def test_mnli_has_two_files(tmp_path: Path) -> None:
    logits = np.eye(3)
    for prefix in ("dev", "test"):
        for split, name in (("matched", "MNLI-m.tsv"), ("mismatched", "MNLI-mm.tsv")):
            path = write_submission(tmp_path, BUILT_IN["MNLI"], f"{prefix}_{split}", ["0", "1", "2"], logits)
            assert path.name == name
            assert path.read_text() == "index\tprediction\n0\tentailment\n1\tneutral\n2\tcontradiction\n"


def test_the_diagnostic_set_is_ax(tmp_path: Path) -> None:
    path = write_submission(tmp_path, BUILT_IN["MNLI"], "diagnostic", ["0", "1"], np.eye(3)[1:])
    assert path.name == "AX.tsv"
    assert path.read_text() == "index\tprediction\n0\tneutral\n1\tcontradiction\n"


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_stsb_is_clipped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    outputs = np.array([-0.2, 2.34567, 5.3, 5.0], np.float32).reshape(shape)
    path = write_submission(tmp_path, BUILT_IN["STS-B"], "test", list("abcd"), outputs)
    assert path.name == "STS-B.tsv"
    assert path.read_text() == "index\tprediction\na\t0.000\nb\t2.346\nc\t5.000\nd\t5.000\n"


def test_custom_tasks(tmp_path: Path) -> None:
    stars = CustomTaskConfig(train="a.csv", dev="b.csv", test="c.csv", labels=["schlecht", "gut"])
    price = CustomTaskConfig(train="a.csv", dev="b.csv", kind="regression")
    config = TaskDataConfig(custom={"stars": stars, "price": price})
    path = write_submission(tmp_path, task_spec("stars", config), "test", ["0", "1"], LOGITS)
    assert path.name == "stars.tsv"
    assert path.read_text(encoding="utf-8") == "index\tprediction\n0\tgut\n1\tschlecht\n"
    path = write_submission(tmp_path, task_spec("price", config), "dev", ["0", "1"], np.array([-1.5, 1234.5678]))
    assert path.read_text() == "index\tprediction\n0\t-1.5\n1\t1234.57\n"


def test_predictions_of_a_diverged_model_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="diverged"):
        write_submission(tmp_path, BUILT_IN["SST-2"], "dev", ["0"], np.array([[math.nan, 1.0]]))
    assert not list(tmp_path.iterdir())
