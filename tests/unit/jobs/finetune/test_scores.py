"""Scores per task, the choice of a grid point, averages, and the closing table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.jobs.finetune.scores import TaskScore, UnitScore, averages, choose, render_table

LOW, HIGH = (("lr", 2e-5),), (("lr", 5e-5),)


def unit(score: float | None, *, point=(), seed: int = 0, seconds: float = 2.0) -> UnitScore:
    metrics = {} if score is None else {"accuracy": score - 0.1, "f1": score + 0.1}
    return UnitScore(point, seed, score, metrics, steps=13, samples=100.0, seconds=seconds)


def scored(task: str, *scores: float) -> TaskScore:
    units = [unit(score, seed=seed) for seed, score in enumerate(scores)]
    found = choose(task, units, train_rows=2490, epochs={(): 3.0})
    assert found is not None
    return found


def test_mean_and_sample_deviation_over_seeds() -> None:
    task = scored("RTE", 0.5, 0.6, 0.8)
    assert task.score == pytest.approx(np.mean([0.5, 0.6, 0.8]))
    assert task.score_std == pytest.approx(np.std([0.5, 0.6, 0.8], ddof=1))
    mean, std = task.metrics["f1"]
    assert mean == pytest.approx(np.mean([0.6, 0.7, 0.9]))
    assert std == pytest.approx(np.std([0.6, 0.7, 0.9], ddof=1))
    one = scored("RTE", 0.5)
    assert one.score_std is None
    assert one.metrics["accuracy"] == (0.4, None)
    record = json.loads(json.dumps(task.as_record()))
    assert record["seeds"] == {"0": 0.5, "1": 0.6, "2": 0.8}
    assert record["metrics"]["accuracy"]["mean"] == pytest.approx(mean - 0.2)
    assert record["samples_per_s"] == 50.0


def test_the_best_mean_wins_not_the_best_single_run() -> None:
    units = [
        unit(0.9, point=LOW, seed=0), unit(0.5, point=LOW, seed=1),
        unit(0.75, point=HIGH, seed=0), unit(0.74, point=HIGH, seed=1),
    ]  # fmt: skip
    task = choose("RTE", units, train_rows=1, epochs={LOW: 1.0, HIGH: 2.0})
    assert task is not None
    assert task.chosen == HIGH
    assert task.epochs == 2.0
    assert dict(task.grid) == {LOW: pytest.approx(0.7), HIGH: pytest.approx(0.745)}


def test_equal_points_give_the_first_and_diverged_ones_never_win() -> None:
    epochs = {LOW: 1.0, HIGH: 1.0}
    tie = choose("RTE", [unit(0.5, point=LOW), unit(0.5, point=HIGH)], train_rows=1, epochs=epochs)
    assert tie is not None
    assert tie.chosen == LOW
    units = [unit(None, point=LOW), unit(-0.2, point=HIGH, seed=0), unit(None, point=HIGH, seed=1)]
    task = choose("CoLA", units, train_rows=1, epochs=epochs)
    assert task is not None
    assert (task.chosen, task.score, task.diverged) == (HIGH, -0.2, (1,))
    assert dict(task.grid)[LOW] is None
    assert choose("CoLA", [unit(None, point=LOW)], train_rows=1, epochs=epochs) is None


def test_averages_leave_out_wnli_and_cola_apart() -> None:
    scores = [scored("CoLA", 0.3), scored("RTE", 0.6), scored("WNLI", 0.1), scored("mine", 0.8)]
    assert averages(scores) == {
        "glue": pytest.approx(0.45),
        "glue_without_cola": pytest.approx(0.6),
        "mean": pytest.approx(0.45),
    }
    assert averages([scored("mine", 0.8)]) == {"mean": 0.8}
    assert averages([]) == {}


def test_table_names_everything_a_reader_needs() -> None:
    text = render_table([scored("CoLA", 0.3, 0.4), scored("RTE", 0.6)], without_score=["MRPC"], absent=["QQP", "MNLI"])
    lines = text.splitlines()
    assert lines[0].split() == ["task", "score", "metrics", "seeds", "rows", "steps", "samples/s"]
    assert lines[1].split()[:4] == ["CoLA", "35.00", "±", "7.07"]
    assert lines[2].startswith("RTE   60.00")
    assert "accuracy 50.00, f1 70.00" in lines[2]
    assert "2,490" in lines[2]
    assert "every fine-tuning diverged" in lines[3]
    assert "GLUE mean      47.50   of CoLA, RTE" in text
    assert "without CoLA   60.00" in text
    assert "absent         QQP, MNLI" in text
    assert "mean of all" not in text  # the same tasks


def test_table_shows_the_chosen_point_of_a_grid() -> None:
    task = choose("RTE", [unit(0.5, point=LOW), unit(0.6, point=HIGH)], train_rows=1, epochs={LOW: 1.0, HIGH: 1.0})
    assert task is not None
    assert "lr 5e-05" in render_table([task])
