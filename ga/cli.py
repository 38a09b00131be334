"""The command line of a search."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from engine.cli import run_main
from engine.config.reading import parse_config
from engine.errors import UserError
from ga.config import SearchConfig

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Error numbers that writing may raise without naming the file."""


def search_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = sys.argv[1:] if argv is None else argv
        config = parse_config(SearchConfig, words, "Search the layer mapping with proxy jobs.")
        from ga.search import search
        from ga.study.storage import DatabaseErrors, explain, hide_password

        try:
            return search(config)
        except DatabaseErrors as error:
            what = f"search.storage={hide_password(config.storage)}: {explain(error)}"
            raise UserError(f"{what}; mend that, and the same command goes on") from None
        except OSError as error:
            where = error.filename2 or error.filename
            if where is None and error.errno not in _NO_ROOM:
                raise
            what = f"{where or config.output_dir}: {error.strerror}"
            raise UserError(f"{what}; mend that, and the same command goes on") from None

    return run_main(body)
