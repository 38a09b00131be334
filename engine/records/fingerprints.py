"""Nested settings as flat ones, and short hashes of them. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": 1} for {"a": {"b": 1}}; a dataclass inside is as good as a dictionary."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        value = asdict(node) if is_dataclass(node) and not isinstance(node, type) else node
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]
