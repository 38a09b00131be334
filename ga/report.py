"""The report of a search: a folder with REPORT.md, leaderboard.csv, pictures, and best.yaml to go on with."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ga.confirmation import Confirmed
from ga.drafts import replaced
from ga.plots import draw_all
from ga.report_text import LEADERBOARD, Facts, report_text
from ga.study.evaluations import Evaluation, evaluated, ranked

REPORT, BEST = "REPORT.md", "best.yaml"


def write_report(
    folder: Path,
    facts: Facts,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    *,
    best_yaml: str | None = None,
) -> Path:
    """Returns the path of REPORT.md. `folder` is replaced as a whole, with all that was in it: after a kill it holds
    the old report or the new one.

    others: other searches with the same proxy. confirmed: genome -> seed -> fitness. best_yaml: text of that file;
    None: there is no winner.
    """
    confirmed = {genome: by_seed for genome, by_seed in confirmed.items() if by_seed}
    with replaced(folder) as draft:
        plots = draw_all(
            draft, evaluations, others, confirmed, heuristics=facts.heuristics, population=facts.population
        )
        write_leaderboard(draft / LEADERBOARD, facts, evaluations)
        text = report_text(facts, evaluations, others, confirmed, plots, best_yaml=folder / BEST)
        (draft / REPORT).write_text(text, encoding="utf-8")
        if best_yaml is not None:
            (draft / BEST).write_text(best_yaml, encoding="utf-8")
    return folder / REPORT


def write_leaderboard(path: Path, facts: Facts, evaluations: Sequence[Evaluation]) -> None:
    """All that is over: ranked genomes, then those without fitness in the order of trials."""
    spent = evaluated(evaluations)
    best = ranked(spent)
    rows = [*enumerate(best, start=1), *(("", one) for one in spent if one.fitness is None)]
    seeds = sorted({seed for one in spent for seed in one.by_seed})
    steps = sorted({step for one in spent for step in one.reports})
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["rank", "genome", "heuristics", "fitness", *facts.tasks]
            + [f"fitness_seed_{seed}" for seed in seeds]
            + [f"fitness_step_{step}" for step in steps]
            + ["outcome", "generation", "trial", "seconds", "cohort", "job", "message"]
        )
        for rank, one in rows:
            table.writerow(
                [rank, one.genome, facts.names(one.genome), one.fitness]
                + [one.scores.get(task) for task in facts.tasks]
                + [one.by_seed.get(seed) for seed in seeds]
                + [one.reports.get(step) for step in steps]
                + [one.outcome, one.generation, one.number, one.seconds, one.cohort, one.job, one.message]
            )
