"""Retrieval by cosine: the nearest documents of each query, and how good they are.

The scores are those of trec_eval, which BEIR takes through pytrec_eval: nDCG with linear gains (Järvelin and
Kekäläinen, 2002), recall over documents of a grade above 0, means over all queries of the split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from engine.tasks.beir import RetrievalSplit

DEPTH = 100
"""Documents that are kept for a query, as many as the deepest metric reads."""
QUERIES_AT_ONCE = 256
DOCUMENTS_AT_ONCE = 8192
"""Sizes of a block of cosines, of 8 MiB in float32."""


def retrieval_metrics(split: RetrievalSplit, queries: torch.Tensor, corpus: torch.Tensor) -> dict[str, float]:
    """Returns the means over the queries of each metric, in [0, 1]. queries: (n, D) float32; corpus: (N, D) float32.

    A document with the id of the query is left out, as BEIR does. Where vectors are not finite, all metrics are 0.
    """
    if not (torch.isfinite(queries).all() and torch.isfinite(corpus).all()):
        return {"ndcg@10": 0.0, "recall@10": 0.0, "recall@100": 0.0}
    place = {name: i for i, name in enumerate(split.corpus_ids)}
    own = torch.tensor([place.get(name, -1) for name in split.ids])
    found = nearest(queries, corpus, own, depth=DEPTH)
    each = list(zip(found.tolist(), split.relevant, strict=True))
    return {
        "ndcg@10": math.fsum(ndcg(documents, grades, 10) for documents, grades in each) / len(each),
        "recall@10": math.fsum(recall(documents, grades, 10) for documents, grades in each) / len(each),
        "recall@100": math.fsum(recall(documents, grades, 100) for documents, grades in each) / len(each),
    }


def nearest(queries: torch.Tensor, corpus: torch.Tensor, own: torch.Tensor, *, depth: int) -> torch.Tensor:
    """Returns (n, min(depth, N)) int64: the documents with the largest cosines of each query, best first; of equal
    ones, the one with the smaller index. -1 where there are no more.

    queries: (n, D), corpus: (N, D) of any float dtype. own: (n,) document that is left out for each query; -1: none.
    """
    blocks = zip(queries.split(QUERIES_AT_ONCE), own.split(QUERIES_AT_ONCE), strict=True)
    return torch.cat([_nearest_of_block(*block, corpus, depth) for block in blocks])


def _nearest_of_block(queries: torch.Tensor, own: torch.Tensor, corpus: torch.Tensor, depth: int) -> torch.Tensor:
    rows = normalize(queries.float(), dim=1)
    scores, found = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64)
    for start in range(0, len(corpus), DOCUMENTS_AT_ONCE):
        block = normalize(corpus[start : start + DOCUMENTS_AT_ONCE].float(), dim=1)
        index = torch.arange(start, start + len(block))
        new = (rows @ block.T).masked_fill_(index == own[:, None], -math.inf)
        scores, found = torch.cat([scores, new], 1), torch.cat([found, index.expand(len(rows), -1)], 1)
        # Documents stand in the order of their indices where cosines are equal, and a stable sort leaves them so.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, found = scores[:, :depth], found.gather(1, order[:, :depth])
    return found.masked_fill(scores == -math.inf, -1)


def ndcg(documents: Sequence[int], grades: Mapping[int, int], k: int) -> float:
    """Returns the discounted gain of the first k documents, best first, by that of the best order: a grade counts
    1 / log2(1 + rank). 0 where nothing is relevant."""
    discounts: npt.NDArray[np.float64] = 1 / np.log2(np.arange(2, k + 2))
    gains = [grades.get(document, 0) for document in documents[:k]]
    best = sorted(grades.values(), reverse=True)[:k]
    ideal = float(np.dot(best, discounts[: len(best)]))
    return float(np.dot(gains, discounts[: len(gains)])) / ideal if ideal else 0.0


def recall(documents: Sequence[int], grades: Mapping[int, int], k: int) -> float:
    """Returns the share of the relevant documents that are among the first k; 0 where nothing is relevant."""
    return sum(document in grades for document in documents[:k]) / len(grades) if grades else 0.0
