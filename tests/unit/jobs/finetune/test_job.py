"""How a teacher is looked at before it teaches, and what is said of the labels of published models."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_checks import check_error
from tiny_world import TinyWorld
from transformers import PreTrainedModel

from engine.cli import parse_config
from engine.config.finetune import FinetuneConfig
from engine.jobs.finetune import banner
from engine.jobs.finetune.clock import TaskClock
from engine.jobs.finetune.job import FinetuneJob
from engine.jobs.finetune.plan import make_finetune_plan
from engine.models.teacher import FrozenTeacher
from engine.ranks.runtime import Runtime
from engine.tasks.evaluation import ConstantAnswer, constant_answer
from engine.tasks.load import load_task
from engine.tasks.model import load_task_model
from engine.tasks.specs import BUILT_IN

MNLI = BUILT_IN["MNLI"]
HERE = Runtime(0, 1, 0, 1, torch.device("cpu"), 1)


@pytest.fixture(scope="module")
def tuned(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an untrained head for MNLI, whose dev rows have each label alike often."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny_world.teacher, folder)
    model: PreTrainedModel = load_task_model(
        str(tiny_world.teacher), key="x", spec=MNLI, dropout=0.0, seed=0, backend="sdpa"
    )
    model.save_pretrained(folder)
    return folder


def job_of(glue: Path, teacher: Path, names: list[str], **more: Any) -> FinetuneJob:
    """The job of this teacher on MNLI, whose outputs are called `names`."""
    config = json.loads((teacher / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (teacher / "config.json").write_text(json.dumps(config))
    words = {"task.name": "MNLI", "task.data_dir": glue, "teacher.path": teacher, "model.path": teacher,
             "deepspeed_config": "ds_configs/zero0_fp32.json", "task.seq_len": 16, **more}  # fmt: skip
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return FinetuneJob(make_finetune_plan(parse_config(FinetuneConfig, argv, "test")), {}, HERE)


def load_teacher(job: FinetuneJob) -> FrozenTeacher:
    (task,) = job.plan.tasks
    teacher = job._load_teacher(task, job._encode(task))
    assert teacher is not None
    return teacher


def test_a_teacher_without_names_must_be_better_than_a_constant(
    glue: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(glue, tuned, ["LABEL_0", "LABEL_1", "LABEL_2"])
    (warning,) = [text for text in job.plan.warnings if text.startswith("teacher.path")]
    assert "its outputs have no names but LABEL_0, LABEL_1, LABEL_2" in warning
    words = ["its dev score on MNLI, ", "constant answer, 37.50", "id2label"]
    check_error(words, lambda: load_teacher(job))
    job = job_of(glue, tuned, ["Contradiction", "NEUTRAL", "entailment"])
    (warning,) = [text for text in job.plan.warnings if text.startswith("teacher.path")]
    assert "they are put into this order" in warning
    capsys.readouterr()
    teacher = load_teacher(job)
    assert not teacher._model.training
    said = capsys.readouterr().out
    assert "teacher of MNLI: dev score " in said
    assert "warning: a teacher that is no better than a constant answer teaches little" in said


def test_what_the_banner_says_of_labels_and_heads(glue: Path, tuned: Path) -> None:
    job = job_of(glue, tuned, ["yes", "no", "maybe"], **{"teacher.path": "null"})
    text = banner.describe_job(job.plan, optimizer="o", device="d", finished=0, unfinished=[])
    assert "MNLI: 24 training rows, 8 + 8 dev rows; 3 labels; score: accuracy" in text
    assert "to beat: accuracy 37.50 on the dev rows, by always answering 'entailment'" in text
    assert "1 fine-tuning; seed 0; " in text
    assert "labels of the training rows: 'entailment' 8, 'neutral' 8, 'contradiction' 8" in text
    assert "its outputs are yes, no, maybe, those of MNLI entailment, neutral, contradiction; its head is rep" in text


def test_the_time_left_of_a_task_is_that_of_its_fine_tunings_so_far() -> None:
    clock = TaskClock(epochs=7.0)
    assert clock.time_left("RTE") == ""
    clock.add(3.0)
    clock._began = time.perf_counter() - 6.0
    assert clock.time_left("RTE") == ", about 8 s left of RTE"


def test_scores_of_one_answer_to_everything(glue: Path, tmp_path: Path) -> None:
    questions = [
        {"id": f"q{i}", "question": "what?", "answers": [{"text": "small", "answer_start": 4}]} for i in range(3)
    ]
    questions.append({"id": "none", "question": "what?", "answers": [], "is_impossible": True})
    squad = {"version": "v2.0", "data": [{"paragraphs": [{"context": "the small model", "qas": questions}]}]}
    (tmp_path / "SQuAD-v2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "SQuAD-v2" / f"{name}-v2.0.json").write_text(json.dumps(squad))

    def best(name: str, folder: Path) -> ConstantAnswer:
        return constant_answer(
            load_task(name, parse_config(FinetuneConfig, ["--task.data_dir", str(folder)], "test").task)
        )

    assert best("MNLI", glue).score == pytest.approx(3 / 8)
    assert best("CoLA", glue).score == 0.0
    assert best("STS-B", glue) == ConstantAnswer("the mean", 0.0, {"pearson": 0.0, "spearman": 0.0})
    qqp = best("QQP", glue)
    assert qqp.answer == "'1'"
    assert qqp.metrics == pytest.approx({"accuracy": 1 / 2, "f1": 2 / 3})
    assert qqp.score == pytest.approx(np.mean([1 / 2, 2 / 3]))
    squad_v2 = best("SQuAD-v2", tmp_path)
    assert squad_v2.answer == "no answer"
    assert squad_v2.metrics == pytest.approx({"exact_match": 1 / 4, "f1": 1 / 4})
