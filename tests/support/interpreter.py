"""Triton without a GPU: its interpreter, which runs kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interpreted() -> Iterator[None]:
    """What is imported inside is made for the interpreter."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def import_triton_interpreted() -> None:
    """Before anybody else imports it: its own library of functions is made for either kind, once."""
    if importlib.util.find_spec("triton") is not None:
        with interpreted():
            import triton.language  # noqa: F401
