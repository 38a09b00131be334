"""The search for the layer mapping from Python (docs/api.md); engine/api.py has the other jobs."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from engine.config.reading import Settings, read_config
from ga.config import SearchConfig
from ga.report.search_sections import LEADERBOARD
from ga.report.write import BEST, FOLDER, REPORT
from ga.search import search as run


@dataclass(frozen=True)
class SearchResult:
    """What a search has left in its folder; it is read anew each time."""

    folder: Path

    @property
    def report(self) -> Path:
        """The report, in Markdown"""
        return self.folder / FOLDER / REPORT

    @property
    def best(self) -> Path:
        """Settings of a whole distillation with the winner, which `engine.api.distill` takes"""
        return self.folder / FOLDER / BEST

    @property
    def leaderboard(self) -> list[dict[str, str]]:
        """All genomes, the best first, with the texts of the columns: `genome`, `fitness`, scores, …"""
        with (self.folder / FOLDER / LEADERBOARD).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def search(*settings: Settings) -> SearchResult:
    """Runs or continues a search to its report, as launch/search.py does: its jobs are processes of their own.

    settings: files, mappings or a SearchConfig; later ones win. Raises UserError for bad settings or input, RunFailure
    when no genome gets a fitness, and Preempted (a KeyboardInterrupt) after Ctrl-C or SIGTERM.
    """
    config = read_config(SearchConfig, *settings)
    run(config)
    return SearchResult(config.root)
