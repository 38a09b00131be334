"""How labels are written: their text, and which texts differ in spelling alone."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any


def is_label(label: str) -> bool:
    """Tells whether prediction files can hold a label."""
    return "\t" not in label and len(label.splitlines()) == 1 and label == label.strip()


def label_text(value: Any) -> str:
    """Returns a label as the text that names it: without spaces around it; JSON numbers and truth values as JSON writes
    them; 1.0 as 1, since tables with empty cells are often written so."""
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


def spelling(label: str) -> str:
    """Returns what labels share that differ in case, Unicode form, invisible characters, quotation marks around them,
    zeros before a number, true for 1, or spaces, - and _ alone."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    bare = re.sub(r"^\+?0*(?=\d)", "", shown.strip(" \t\n\"'`“”‘’«»").casefold())
    return {"true": "1", "false": "0"}.get(bare, re.sub(r"[\s_-]+", "_", bare))
