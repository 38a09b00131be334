"""launch/score.py on tiny encoders: what is scored, beside what, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from beir_folder import write_beir
from glue_sample import write_glue_sample
from in_process import refuse, succeed
from sentence_folder import MEAN, surround
from tiny_world import TinyWorld
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from engine.config.distill import DataConfig, RunConfig, TeacherConfig
from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.config.tools import ScoreConfig
from engine.jobs.score.job import UNSEEN, score
from engine.records.run_dir import RunDir, as_yaml
from engine.tasks.load import load_task, seen_by_searches
from engine.tasks.metrics import compute

DOCUMENTS = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(["small model", "a map", "today"])]
QUERIES = {f"q{i}": text for i, text in enumerate(["small model", "a map", "today", "the small model", "one map"])}
JUDGED = [(query, f"d{i % 3}", 1) for i, query in enumerate(QUERIES)]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    write_glue_sample(tmp_path / "glue")
    return tmp_path / "glue"


@pytest.fixture
def tasks(tmp_path: Path, glue: Path) -> TaskDataConfig:
    faq = CustomTaskConfig(kind="retrieval", folder=str(write_beir(tmp_path / "faq", DOCUMENTS, QUERIES, test=JUDGED)))
    file, texts = str(glue / "STS-B" / "dev.tsv"), {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    pairs = CustomTaskConfig(kind="regression", dev=file, **texts)  # type: ignore[arg-type]
    return TaskDataConfig(data_dir=str(glue), custom={"faq": faq, "pairs": pairs})


def last_token_model(world: TinyWorld, folder: Path) -> Path:
    shutil.copytree(world.teacher, folder)
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    return surround(folder, pooling=MEAN | flags, settings={"prompts": {"query": "the "}})


def test_similarities_are_cosines_of_the_models_own_vectors(
    tiny_world: TinyWorld, tasks: TaskDataConfig, tmp_path: Path
) -> None:
    models = [tiny_world.teacher, last_token_model(tiny_world, tmp_path / "model")]
    found = score(ScoreConfig(models=[str(model) for model in models], tasks=["sts-b", "pairs"], task=tasks))
    rows = load_task("STS-B", tasks).splits["dev"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.teacher)
    model = AutoModel.from_pretrained(tiny_world.teacher).eval()

    def states(texts: list[str]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]

    first, second = states(rows.first), states(rows.second)
    unseen = ~seen_by_searches(load_task("pairs", tasks).splits["dev"])
    poolings = {models[0]: lambda state: state.mean(0), models[1]: lambda state: state[-1]}
    for path, pooling in poolings.items():
        pairs = zip(first, second, strict=True)
        cosines = torch.stack([cosine_similarity(pooling(a), pooling(b), dim=0) for a, b in pairs]).numpy()
        mine = found[str(path)]
        assert mine["STS-B"] == mine["pairs"]
        assert mine["pairs"]["spearman"] == pytest.approx(compute("spearman", cosines, rows.labels), abs=1e-6)
        half = compute("pearson", cosines[unseen], np.asarray(rows.labels)[unseen])
        assert mine[f"pairs, {UNSEEN}"]["pearson"] == pytest.approx(half, abs=1e-4)


def test_retrieval_and_probes_in_one_table(tiny_world: TinyWorld, tasks: TaskDataConfig, tmp_path: Path) -> None:
    model = last_token_model(tiny_world, tmp_path / "model")
    file = tmp_path / "tasks.yaml"
    file.write_text(as_yaml(ScoreConfig(models=[str(tiny_world.teacher), str(model)], task=tasks)))
    output = succeed("score", "--config", file, "--tasks", "faq", "MNLI", "CoLA")
    table = output.partition("\n\n")[2].splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == [str(tiny_world.teacher), str(model)]
    assert [line.partition(": ")[2].split()[0] for line in table[1:]] == [
        *("ndcg@10", "recall@10", "recall@100") * 2,
        "accuracy",
        "matthews",
    ]
    assert "faq: recall@100" in table[3]
    assert table[3].split()[2:] == ["1.0000", "1.0000", "(100%)"], "three documents"
    assert "warnings    faq: 5 rows in one split" in output


def test_a_single_student_is_compared_with_its_teacher(
    tiny_world: TinyWorld, tasks: TaskDataConfig, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(tiny_world.teacher, run_dir.student)
    config = RunConfig(teacher=TeacherConfig(path=str(tiny_world.teacher)), data=DataConfig(path="gone"))
    run_dir.config.write_text(as_yaml(config))
    found = score(ScoreConfig(models=[str(run_dir.root)], task=tasks))
    assert list(found) == [str(tiny_world.teacher), str(run_dir.root)]
    assert found[str(run_dir.root)] == found[str(tiny_world.teacher)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "SQuAD"], "tasks='SQuAD-v1.1': finds answers in a text, which needs fine-tuning"),
        (["--tasks", "STSB2"], "did you mean 'STS-B'"),
        (["--models", "no/such/model"], "no/such/model"),
        (["--seq_len", "4"], "seq_len=4: must be at least 8 tokens"),
        (["--tasks", "[]"], "tasks=[]: name at least one task"),
    ],
)
def test_refusals(words: list[str], says: str, tiny_world: TinyWorld, glue: Path) -> None:
    assert says in refuse("score", "--models", tiny_world.teacher, "--task.data_dir", glue, *words)
