"""nDCG, recall and nearest documents against cases that are computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from engine.tasks import retrieval
from engine.tasks.beir import RetrievalSplit
from engine.tasks.retrieval import ndcg, nearest, recall, retrieval_metrics

LOG3 = math.log2(3)


@pytest.mark.parametrize(
    ("documents", "grades", "k", "wanted"),
    [
        ([5, 6, 7], {5: 1}, 10, 1.0),
        ([6, 5, 7], {5: 1}, 10, 1 / LOG3),
        ([6, 7], {5: 1}, 10, 0.0),
        ([6, 5, 7], {5: 3, 7: 1}, 10, (3 / LOG3 + 1 / 2) / (3 + 1 / LOG3)),
        ([6, 5, 7], {5: 3, 7: 1}, 2, (3 / LOG3) / (3 + 1 / LOG3)),
        ([5, 6], {5: 1, 6: 1, 7: 1}, 2, 1.0),
        ([5, 6], {}, 10, 0.0),
        ([5, -1, -1], {5: 2}, 10, 1.0),
    ],
)
def test_ndcg(documents: list[int], grades: dict[int, int], k: int, wanted: float) -> None:
    assert ndcg(documents, grades, k) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("documents", "grades", "k", "wanted"),
    [([5, 6, 7], {7: 1}, 3, 1.0), ([5, 6, 7], {7: 1}, 2, 0.0), ([5, 6], {5: 9, 7: 1}, 2, 0.5), ([5], {}, 1, 0.0)],
)
def test_recall(documents: list[int], grades: dict[int, int], k: int, wanted: float) -> None:
    assert recall(documents, grades, k) == wanted


@pytest.mark.parametrize(("queries_at_once", "documents_at_once"), [(256, 8192), (2, 3), (1, 1)])
def test_nearest_documents_do_not_depend_on_blocks(
    queries_at_once: int, documents_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", queries_at_once)
    monkeypatch.setattr(retrieval, "DOCUMENTS_AT_ONCE", documents_at_once)
    queries = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    corpus = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 9.0], [1.0, 0.0], [1.0, 1.0]])
    found = nearest(queries, corpus, torch.tensor([-1, 2, -1]), depth=4)
    assert found.tolist() == [[1, 3, 4, 0], [0, 4, 1, 3], [4, 0, 1, 2]], "equal cosines in the order of the corpus"


def test_a_small_corpus_has_no_more_documents() -> None:
    corpus = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nearest(corpus[:1], corpus, torch.tensor([0]), depth=100).tolist() == [[1, -1]]


def split_of(relevant: list[dict[int, int]]) -> RetrievalSplit:
    ids = [f"q{i}" for i in range(len(relevant) - 1)] + ["d0"]
    return RetrievalSplit("dev", ids, ids, relevant, ("d2", "d1", "d0"), ("", "", ""))


def test_metrics_are_means_over_queries_without_the_document_of_the_querys_own_id() -> None:
    corpus = torch.eye(3)
    split = split_of([{1: 1}, {}, {0: 1}])
    metrics = retrieval_metrics(split, torch.tensor([[0.1, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.2, 1.0]]), corpus)
    second, third = 1 / LOG3, 1 / 2
    assert metrics == pytest.approx({"ndcg@10": (third + second) / 3, "recall@10": 2 / 3, "recall@100": 2 / 3})


def test_a_student_that_diverged_scores_nothing() -> None:
    corpus = torch.eye(3)
    corpus[1, 1] = math.nan
    found = retrieval_metrics(split_of([{1: 1}, {2: 1}]), torch.ones(2, 3), corpus)
    assert found == {"ndcg@10": 0.0, "recall@10": 0.0, "recall@100": 0.0}
