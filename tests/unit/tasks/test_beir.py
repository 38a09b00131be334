"""Retrieval in BEIR's layout: what is read, which split is for what, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from beir_folder import HEADER, write_beir
from task_checks import check_error

from engine.config.finetune import CustomTaskConfig, TaskDataConfig
from engine.tasks.beir import RetrievalSplit, read_beir
from engine.tasks.load import TaskData, load_task, seen_by_searches

DOCUMENTS = [
    {"_id": "d1", "title": "The title", "text": "and text", "metadata": {"url": "x"}},
    {"_id": "d3", "title": "", "text": " small model "},
    {"_id": "d2", "text": "no title"},
]
QUERIES = {"q1": "a model", "q2": "a title", "q3": "much else", "q4": "unused"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(
        tmp_path / "beir", DOCUMENTS, QUERIES, test=[("q2", "d1", 2), ("q1", "d3", 1), ("q2", "d2", 0), ("q3", "d1", 0)]
    )


def config_of(folder: Path, **settings: object) -> TaskDataConfig:
    custom = {"faq": CustomTaskConfig(kind="retrieval", folder=str(folder))}
    return TaskDataConfig(custom=custom, **settings)  # type: ignore[arg-type]


def load(folder: Path, **settings: object) -> TaskData:
    return load_task("faq", config_of(folder, **settings))


def test_texts_and_judgements(folder: Path) -> None:
    splits, remarks = read_beir(folder, "task.custom.faq.folder")
    assert splits == {
        "dev": RetrievalSplit(
            name="dev",
            ids=["q2", "q1", "q3"],
            queries=["a title", "a model", "much else"],
            relevant=[{2: 2}, {0: 1}, {}],
            corpus_ids=("d3", "d2", "d1"),
            corpus=("small model", "no title", "The title and text"),
        )
    }
    assert remarks == [f"{folder}/qrels/test.tsv: queries without a relevant document, which score 0: 1"]


@pytest.mark.parametrize(
    ("there", "train", "dev"),
    [
        ("train dev test", "train", "test"),
        ("train dev", "train", "dev"),
        ("dev test", "dev", "test"),
        ("train test", "train", "test"),
    ],
)
def test_final_scores_come_from_the_last_split_and_choices_from_the_first(
    there: str, train: str, dev: str, tmp_path: Path
) -> None:
    query = {"train": "q1", "dev": "q2", "test": "q3"}
    folder = write_beir(
        tmp_path / "x", DOCUMENTS, QUERIES, **{name: [(query[name], "d1", 1)] for name in there.split()}
    )
    data = load(folder)
    assert (data.splits["train"].ids, data.splits["dev"].ids) == ([query[train]], [query[dev]])
    assert not data.has_one_split


def test_the_only_split_is_halved_by_ids_alone(tmp_path: Path) -> None:
    queries = {f"q{i}": f"model {i}" for i in range(40)}
    judged = [(name, "d1", 1) for name in queries]
    data = load(write_beir(tmp_path / "a", DOCUMENTS, queries, test=judged))
    assert data.has_one_split
    assert data.splits["dev"].ids == list(queries)
    half = data.splits["train"]
    assert half.name == "train"
    assert half.ids == [name for name, seen in zip(queries, seen_by_searches(data.splits["dev"]), strict=True) if seen]
    assert 10 < len(half) < 30
    assert f"faq: 40 rows in one split; a fitness comes from {len(half)} of them, chosen by a hash" in data.warnings[0]
    backwards = load(write_beir(tmp_path / "b", DOCUMENTS, queries, dev=judged[::-1]))
    assert sorted(backwards.splits["train"].ids) == sorted(half.ids)


def test_a_single_query_is_in_the_half_that_is_seen(tmp_path: Path) -> None:
    for name in ("q1", "q2", "q3"):
        data = load(write_beir(tmp_path / name, DOCUMENTS, QUERIES, dev=[(name, "d1", 1)]))
        assert data.splits["train"].ids == [name]


def test_caps_count_queries_and_the_hash_knows_every_document(folder: Path) -> None:
    assert load(folder, dev_rows=2).splits["dev"].ids == ["q2", "q1"]
    assert len(load(folder, train_rows=1).splits["train"]) == 1
    before = load(folder).sha256
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("no title", "new text"))
    assert load(folder).sha256 != before


def test_queries_of_both_splits_are_counted(tmp_path: Path) -> None:
    judged = {"train": [("q1", "d1", 1)], "test": [("q1", "d2", 1), ("q2", "d1", 1)]}
    [remark] = load(write_beir(tmp_path / "x", DOCUMENTS, QUERIES, **judged)).warnings
    assert remark.startswith("faq: 1 of 2 dev rows have the texts of a training row")


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return apply


def add(name: str, line: str) -> Callable[[Path], None]:
    return edit(name, lambda text: f"{text}{line}\n")


QRELS = "qrels/test.tsv"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / QRELS).unlink(), ["task.custom.faq.folder=", "no train.tsv or dev.tsv or test.tsv"]),
        (lambda folder: (folder / "corpus.jsonl").unlink(), ["corpus.jsonl: no such file"]),
        (add(QRELS, "q1\td1"), [f"{QRELS}:6: has 2 columns, not 3"]),
        (add(QRELS, "q1\td1\tgood"), [f"{QRELS}:6: score 'good' is not a whole number"]),
        (add(QRELS, "q1\td3\t2"), [f"{QRELS}:6: judges document 'd3' for query 'q1' as line 3 does"]),
        (add(QRELS, "q1\td8\t1\nq1\td9\t0"), [f"{QRELS}:6: 'd8' is not in corpus.jsonl (2 such lines)"]),
        (add(QRELS, "q9\td1\t1"), [f"{QRELS}:6: 'q9' is not in queries.jsonl (1 such line)"]),
        (
            edit(QRELS, lambda text: text.replace(HEADER, "q\td\ts")),
            ["no column 'query-id' (its columns: 'q', 'd', 's')"],
        ),
        (edit(QRELS, lambda text: f"{HEADER}\n"), [f"{QRELS}: has no rows"]),
        (add("corpus.jsonl", json.dumps(DOCUMENTS[0])), ["corpus.jsonl:4: has the _id 'd1' of line 1"]),
        (add("corpus.jsonl", '{"_id": 7, "text": "x"}'), ["corpus.jsonl:4: has no text as its _id"]),
        (add("corpus.jsonl", '{"_id": "d7", "text": null}'), ["corpus.jsonl:4: title and text of 'd7' must be texts"]),
        (add("corpus.jsonl", '{"_id": "d7", "te'), ["corpus.jsonl:4: is not JSON"]),
        (add("queries.jsonl", '{"_id": "q7", "text": " "}'), ["queries.jsonl:5: the query 'q7' is empty"]),
        (edit("queries.jsonl", lambda text: ""), ["queries.jsonl: is empty"]),
    ],
)
def test_what_is_torn_is_refused(damage: Callable[[Path], None], says: list[str], folder: Path) -> None:
    damage(folder)
    check_error(says, lambda: load(folder))


def test_no_such_folder(tmp_path: Path) -> None:
    check_error("task.custom.faq.folder=", lambda: load(tmp_path / "gone"))
