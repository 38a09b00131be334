"""Retrieval in the layout of BEIR (github.com/beir-cellar/beir): a folder with corpus.jsonl (_id, title, text),
queries.jsonl (_id, text) and qrels/SPLIT.tsv (query-id, corpus-id, score). Errors name the file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.records.columns import counted
from engine.tasks.tables import MISSING, beside, open_table

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
JUDGEMENT = ("query-id", "corpus-id", "score")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class RetrievalSplit:
    """n queries and the corpus in which their documents are to be found."""

    name: str
    ids: list[str]
    """(n,) of the queries."""
    queries: list[str]
    relevant: list[dict[int, int]]
    """(n,) document, by its index in the corpus, -> grade > 0."""
    corpus_ids: tuple[str, ...]
    """(N,) of the documents, the largest first: of equal scores the first counts as the higher, as trec_eval has it."""
    corpus: tuple[str, ...]
    """(N,) title and text of each document."""

    def __len__(self) -> int:
        return len(self.ids)


def read_beir(folder: Path, key: str) -> tuple[dict[str, RetrievalSplit], list[str]]:
    """Returns the splits and remarks: `dev` is the split that final scores come from (test, else dev, else train), and
    `train`, where there is another, the one for everything that chooses (train, else dev).

    key: setting that names the folder. Raises UserError for files that are missing, torn or do not fit each other.
    """
    if not folder.is_dir():
        raise UserError(f"{key}={str(folder)!r}: no such folder{beside(folder)}")
    judged = {name: file for name in SPLITS if (file := folder / QRELS / f"{name}.tsv").is_file()}
    if not judged:
        names = " or ".join(f"{name}.tsv" for name in SPLITS)
        raise UserError(f"{key}={str(folder)!r}: no {names} in its folder {QRELS}; add one")
    queries = _read_texts(folder / QUERIES)
    for query, (line, text) in queries.items():
        if not text:
            raise UserError(f"{folder / QUERIES}:{line}: the query {query!r} is empty; remove it, or give its text")
    documents = sorted(_read_texts(folder / CORPUS).items(), reverse=True)
    ids, texts = tuple(name for name, _ in documents), tuple(text for _, (_, text) in documents)
    index = {name: i for i, name in enumerate(ids)}
    final = next(name for name in reversed(SPLITS) if name in judged)
    chooses = next((name for name in SPLITS if name in judged and name != final), None)
    splits, remarks = {}, []
    for name, source in (("train", chooses), ("dev", final)):
        if source is None:
            continue
        relevant = _read_judgements(judged[source], queries, index)
        splits[name] = RetrievalSplit(
            name, list(relevant), [queries[query][1] for query in relevant], list(relevant.values()), ids, texts
        )
        if idle := sum(not documents for documents in relevant.values()):
            remarks.append(f"{judged[source]}: queries without a relevant document, which score 0: {idle:,}")
    return splits, remarks


def _read_texts(path: Path) -> dict[str, tuple[int, str]]:
    """Returns line and text by id, in the order of the file; a title stands before its text, as BEIR's models see
    it."""
    found: dict[str, tuple[int, str]] = {}
    for line, (name, title, text) in _read_columns(path, ("_id", "text"), ("_id", "title", "text")):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}:{line}: has no text as its _id; give each line an _id of its own")
        if name in found:
            raise UserError(f"{path}:{line}: has the _id {name!r} of line {found[name][0]}; remove one of them")
        title = "" if title in (MISSING, None) else title
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f"{path}:{line}: title and text of {name!r} must be texts; repair the line")
        found[name] = line, f"{title} {text}".strip()
    if not found:
        raise UserError(f"{path}: has no rows; give a file with at least one")
    return found


def _read_judgements(
    path: Path, queries: dict[str, tuple[int, str]], index: dict[str, int]
) -> dict[str, dict[int, int]]:
    """Returns for each query of the file its relevant documents with their grades. Documents of a grade of 0 or less
    are not relevant."""
    found: dict[str, dict[int, int]] = {}
    judged: dict[tuple[str, str], int] = {}
    unknown: dict[str, list[tuple[int, str]]] = {QUERIES: [], CORPUS: []}
    for line, (query, document, score) in _read_columns(path, JUDGEMENT, JUDGEMENT):
        query, document = str(query), str(document)
        if (query, document) in judged:
            raise UserError(
                f"{path}:{line}: judges document {document!r} for query {query!r} as line {judged[query, document]} "
                "does; remove one of them"
            )
        judged[query, document] = line
        try:
            grade = int(score)
        except ValueError:
            raise UserError(f"{path}:{line}: score {score!r} is not a whole number; repair the line") from None
        if query not in queries or document not in index:
            unknown[QUERIES] += [(line, query)] if query not in queries else []
            unknown[CORPUS] += [(line, document)] if document not in index else []
            continue
        found.setdefault(query, {})
        if grade > 0:
            found[query][index[document]] = grade
    for file, lines in unknown.items():
        if lines:
            line, name = lines[0]
            raise UserError(
                f"{path}:{line}: {name!r} is not in {file} ({counted(len(lines), 'such line')}); add it there, or "
                "remove the lines"
            )
    if not found:
        raise UserError(f"{path}: has no rows; give a file with at least one")
    return found


def _read_columns(path: Path, needed: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Yields line and values of the wanted columns; MISSING for one that is not needed and not there."""
    table = open_table(path, wanted=needed)
    absent = [name for name in needed if name not in table.header]
    if absent:
        shown = ", ".join(repr(name[:40]) for name in table.header[:5])
        raise UserError(f"{path}: no column {absent[0]!r} (its columns: {shown}); {', '.join(needed)} are needed")
    at = [table.header.index(name) if name in table.header else None for name in wanted]
    for line, values in table.rows:
        if len(values) != len(table.header):
            raise UserError(f"{path}:{line}: has {len(values)} columns, not {len(table.header)}; repair the line")
        yield line, [MISSING if i is None else values[i] for i in at]
