"""The probe evaluator on real rows and a student whose features are known."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from beir_folder import write_beir
from compare import assert_same_bits
from glue_sample import write_glue_sample
from sentence_folder import MEAN, surround
from tiny_world import TinyWorld
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.data.batch import Batch
from engine.errors import UserError
from engine.hub.sentence import SentenceEncoder, read_sentence_encoder
from engine.jobs.proxy.baselines import Start
from engine.jobs.proxy.evaluators import ProbeEvaluator, ProgramEvaluator, Scores
from engine.ranks.runtime import Runtime
from engine.records.records import read_records
from engine.records.run_dir import RunDir
from engine.tasks.load import TaskData, load_task
from engine.tasks.metrics import score_task
from engine.tasks.probe import ProbeFeatures, probe_outputs
from engine.train import failures
from engine.train.monitor import Monitor


class WordCounter:
    """ "Hidden states" that say which word stands where: one-hot vectors, so that mean pooling gives a bag of words."""

    seed, layers = 0, 2

    def __init__(self, words: int) -> None:
        self.words = words
        self.batches = 0

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        self.batches += 1
        words = torch.nn.functional.one_hot(batch.input_ids, self.words).float()
        return tuple(words.roll(self.layers - layer, 2) for layer in sorted(layers))

    def save(self, folder: Path) -> None:
        raise AssertionError("a probe needs no folder")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    if not torch.distributed.is_initialized():
        store = tmp_path_factory.mktemp("store") / "file"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()
    else:
        yield


def left_out(task: TaskData, features: torch.Tensor, folds: int) -> dict[str, float]:
    """Metrics of probes that have not seen the fold of the row that they score."""
    labels = task.splits["train"].labels
    outputs = []
    for i in range(len(labels)):
        rest = [j for j in range(len(labels)) if j % folds != i % folds]
        one = {"one": ProbeFeatures(features[[i]], None)}
        outputs.append(probe_outputs(task.spec, ProbeFeatures(features[rest], None), labels[rest], one)["one"])
    return score_task(task.spec, np.concatenate(outputs), labels)


@pytest.mark.usefixtures("alone")
def test_scores_follow_from_the_pooled_features_of_training_rows(tiny_world: TinyWorld, tmp_path: Path) -> None:
    folds = 4
    write_glue_sample(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.teacher)
    names = ("SST-2", "MRPC", "STS-B", "MNLI", "CoLA")
    tasks = [load_task(name, TaskDataConfig(data_dir=str(tmp_path))) for name in names]
    runtime = Runtime(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    evaluator = ProbeEvaluator(tasks, tokenizer, longest=64, folds=folds, runtime=runtime)
    student = WordCounter(len(tokenizer))
    scores = evaluator(student)
    assert student.batches == -(-len(evaluator._texts._encoded) // 64), (
        "every text is read once, whatever the tasks share"
    )
    assert evaluator(student) == scores
    assert list(scores.tasks) == list(names)

    def bag(texts: list[str]) -> torch.Tensor:
        rows = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        counts = torch.stack([torch.bincount(torch.tensor(row), minlength=len(tokenizer)).float() for row in rows])
        return counts / counts.sum(1, keepdim=True)

    sst, sts = tasks[0], tasks[2]
    pairs = sts.splits["train"]
    outputs = probe_outputs(sts.spec, None, None, {"rows": ProbeFeatures(bag(pairs.first), bag(pairs.second))})
    assert scores.metrics["STS-B"] == pytest.approx(score_task(sts.spec, outputs["rows"], pairs.labels), abs=1e-4)
    last = bag(sst.splits["train"].first)
    assert scores.metrics["SST-2"] == pytest.approx(left_out(sst, last, folds))
    words = bag(tasks[4].splits["train"].first)
    every = torch.cat([words.roll(student.layers - layer, 1) for layer in range(student.layers + 1)], dim=1)
    assert scores.metrics["CoLA"] == pytest.approx(left_out(tasks[4], every, folds)), "of all layers"


@pytest.mark.usefixtures("alone")
def test_retrieval_is_scored_on_its_training_queries_by_the_teachers_pooling(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_world.teacher, tmp_path / "teacher")
    surround(teacher, pooling=MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True})
    sentence, _ = read_sentence_encoder(str(teacher), "teacher.path")
    documents = [{"_id": f"d{i}", "text": text} for i, text in enumerate(["small model", "one map", "today"])]
    judged = {"train": [("q1", "d0", 1), ("q2", "d1", 1)], "test": [("q3", "d2", 1)]}
    queries = {"q1": "model", "q2": "map", "q3": "today"}
    faq = CustomTaskConfig(kind="retrieval", folder=str(write_beir(tmp_path / "faq", documents, queries, **judged)))
    task = load_task("faq", TaskDataConfig(custom={"faq": faq}))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)

    def scores(sentence: SentenceEncoder | None) -> Scores:
        evaluator = ProbeEvaluator([task], tokenizer, longest=64, folds=2, runtime=runtime, sentence=sentence)
        return evaluator(WordCounter(len(tokenizer)))

    means = scores(None)
    assert means.tasks == {"faq": 1.0}, "each query shares its word with one document"
    assert means.metrics == {"faq": {"ndcg@10": 1.0, "recall@10": 1.0, "recall@100": 1.0}}
    ranks = (3, 2)
    first_tokens = sum(1 / math.log2(1 + rank) for rank in ranks) / 2
    assert scores(sentence).tasks["faq"] == pytest.approx(first_tokens), "all begin with [CLS]: the largest id is first"


@pytest.mark.usefixtures("alone")
def test_dev_rows_change_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.teacher)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    write_glue_sample(tmp_path)

    def scores(**rows: int) -> Scores:
        config = TaskDataConfig(data_dir=str(tmp_path), **rows)
        tasks = [load_task(name, config) for name in ("SST-2", "MRPC", "STS-B", "MNLI")]
        evaluator = ProbeEvaluator(tasks, tokenizer, longest=64, folds=3, runtime=runtime)
        return evaluator(WordCounter(len(tokenizer)))

    assert scores(dev_rows=2) == scores()
    assert scores(train_rows=10) != scores()


@pytest.mark.faults
def test_what_ends_a_silent_fine_tuning_is_in_the_jobs_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "job")
    monitor = Monitor.silent(run_dir, steps=9, device=torch.device("cpu"))
    monitor.begin(0)
    monitor.say("nothing of this")
    monitor.close()
    assert not run_dir.root.exists()
    monitor.record_from_any_rank(failures.out_of_memory(4, rank=1, why="DefaultCPUAllocator: can't allocate memory"))
    (record,) = read_records(run_dir.records)
    assert (record["status"], record["step"], record["rank"]) == ("out_of_memory", 4, 1)


@pytest.mark.usefixtures("alone")
def test_a_program_is_asked_about_the_model_itself(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_world.teacher).bert
    student = Start(model, layers=4, seed=0)
    asked: list[PreTrainedModel] = []

    def score(given: PreTrainedModel) -> dict[str, float]:
        asked.append(given)
        return {"b": torch.tensor(2.0), "a": 1}

    evaluator = ProgramEvaluator(score, ["a", "b"], torch.device("cpu"), tmp_path / "scored")
    assert evaluator(student) == Scores({"a": {"score": 1.0}, "b": {"score": 2.0}}, {"a": 1.0, "b": 2.0})
    assert list(evaluator(student).tasks) == ["a", "b"]
    assert not (tmp_path / "scored").exists()
    assert type(asked[0]) is type(model)
    assert not asked[0].training
    assert_same_bits(asked[0].state_dict(), model.state_dict())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (
            {"a": 1.0},
            "proxy.tasks and proxy.other_tasks are a, b, but the evaluator returns scores of a: name the same",
        ),
        ({}, "the evaluator returns scores of nothing"),
        ({"a": math.nan, "b": math.inf}, "the evaluator returns no finite score of a, b"),
    ],
)
def test_scores_of_a_program_are_checked(
    scores: dict[str, float], says: str, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    student = Start(AutoModelForMaskedLM.from_pretrained(tiny_world.teacher).bert, layers=4, seed=0)
    evaluator = ProgramEvaluator(lambda model: scores, ["a", "b"], torch.device("cpu"), tmp_path / "scored")
    with pytest.raises(UserError, match=says):
        evaluator(student)
