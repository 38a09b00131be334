"""The command line of a search."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli import parse_config, run_main
from ga.config import SearchConfig


def search_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = sys.argv[1:] if argv is None else argv
        config = parse_config(SearchConfig, words, "Search the layer mapping with proxy jobs.")
        from ga.search import search

        return search(config)

    return run_main(body)
