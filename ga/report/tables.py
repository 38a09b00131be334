"""Tables in Markdown, as GitHub renders it."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Returns a table in Markdown. left: columns aligned to the left; the others hold numbers."""
    rule = [":---" if i in left else "---:" for i in range(len(header))]
    lines = [[_cell(text) for text in header], rule, *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Returns plain text for a cell: nothing in it is Markdown, and it is one line."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split()))
