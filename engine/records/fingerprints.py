"""Nested settings as flat ones, and short hashes of them and of source. No torch here."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from engine.errors import UserError


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": 1} for {"a": {"b": 1}}; a dataclass inside is as good as a dictionary."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        value = asdict(node) if is_dataclass(node) and not isinstance(node, type) else node
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def source_hash(code: Callable[..., Any]) -> str:
    """Returns a short hash of the source of a function, or of a class with those that it extends and that are not of
    this library. Raises UserError where there is none to read."""
    parts = [code]
    if isinstance(code, type):
        parts += [above for above in code.__mro__[1:] if not _is_known(above.__module__)]
    try:
        return digest([inspect.getsource(part) for part in parts])
    except (OSError, TypeError):
        raise UserError(
            f"the source of {getattr(code, '__qualname__', repr(code))} cannot be read, by which a later start could "
            "tell that it is the same; give a function or a class that is written in a file or a notebook"
        ) from None


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in ("engine", "builtins", "abc", "typing", "torch")


def digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]
