"""A folder in BEIR's layout, of rows that a test names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = "query-id\tcorpus-id\tscore"


def write_beir(
    folder: Path,
    documents: Sequence[Mapping[str, Any]],
    queries: Mapping[str, str],
    **qrels: Sequence[tuple[str, str, int]],
) -> Path:
    """Writes corpus.jsonl, queries.jsonl and qrels/NAME.tsv; documents have the keys of BEIR's."""
    (folder / "qrels").mkdir(parents=True)
    asked = [{"_id": name, "text": text, "metadata": {}} for name, text in queries.items()]
    for name, rows in (("corpus", documents), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, judged in qrels.items():
        lines = [HEADER, *("\t".join(map(str, row)) for row in judged)]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder
