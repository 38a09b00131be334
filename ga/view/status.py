"""The table of --status: what a search has done, and who works on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from optuna import Study

from engine.errors import UserError
from engine.records.columns import columns, counted, labelled_lines
from ga.config import STUDY_FILE, SearchConfig
from ga.jobs.outcome import Outcome
from ga.study.drivers import LEASE_S, PresentDriver, present_drivers
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations, read_history, spent_evaluations
from ga.study.storage import open_storage
from ga.study.studies import BUDGET, begun_lists, load_search

SHOWN = 10


def print_status(config: SearchConfig) -> None:
    """Prints a table of the search. Raises UserError where none was begun."""
    if config.search.storage is None and not (config.root / STUDY_FILE).is_file():
        raise UserError(f"output_dir={config.output_dir!r}: no search was begun there ({STUDY_FILE} is missing)")
    storage = open_storage(config.storage, existing=True)
    try:
        study = load_search(storage, config)
        budget = study.user_attrs.get(BUDGET, config.search.trials)
        print(status_text(study, begun_lists(storage, study), storage.shown_url, trials=budget))
    finally:
        storage.close()


def status_text(study: Study, lists: Mapping[str, Study], storage: str, *, trials: int) -> str:
    """Returns the table of --status. lists: the studies of yardstick and confirmation, as far as they were begun.
    storage: its URL, fit to be shown. trials: budget."""
    evaluations = read_history(study)
    spent = spent_evaluations(evaluations)
    outcomes = Counter(one.outcome for one in spent)
    repeated = sum(not one.counts for one in evaluations)
    seconds = [one.seconds for one in spent if one.seconds]
    rows: list[tuple[str, str | list[str]]] = [
        ("search", f"{study.study_name} in {storage}"),
        (
            "evaluations",
            f"{len(spent)} of {trials} done"
            + "".join(f", {count} {name}" for name, count in outcomes.items() if name != Outcome.OK.value)
            + (f"; {repeated} repeated proposals" if repeated else ""),
        ),
        ("cost", f"{fmean(seconds):.1f} s per evaluation" if seconds else "not known yet"),
    ]
    unfinished = [one for one in evaluations if one.outcome == RUNNING]
    drivers = present_drivers(study)
    for name, listed in lists.items():
        found = read_history(listed)
        rows.append((name, f"{len(spent_evaluations(found))} of {len(listed.get_trials(deepcopy=False))} done"))
        unfinished += [one for one in found if one.outcome == RUNNING]
        drivers |= present_drivers(listed)
    rows.append(("drivers", _drivers_text(drivers) or "none (the same command without --status continues)"))
    by_job: dict[str, list[str]] = {}
    at_work = {id for id, driver in drivers.items() if not driver.is_silent}
    for one in unfinished:
        if one.owner in at_work:
            by_job.setdefault(one.job or "starting", []).append(one.genome)
    rows.append(("running", [f"{job}: {' '.join(names)}" for job, names in by_job.items()] or "nothing"))
    if unfinished and not at_work:
        begun = counted(len(unfinished), "genome")
        rows.append(("open", f"{begun} begun by drivers that have ended; the same command continues"))
    return labelled_lines(rows) + "\n\n" + best_table(evaluations, SHOWN)


def _drivers_text(drivers: Mapping[str, PresentDriver]) -> list[str]:
    silent = f": no sign of life for more than {LEASE_S:.0f} s; the same command on a running machine continues"
    return [one.name + (silent if one.is_silent else "") for one in drivers.values()]


def best_table(evaluations: Sequence[Evaluation], shown: int) -> str:
    best = rank_evaluations(evaluations)
    if not best:
        return "no genome has a fitness yet"
    tasks = list(best[0].scores)
    rows = [["", "genome", "fitness", *tasks, "trial"]]
    for place, one in enumerate(best[:shown], start=1):
        scores = [f"{one.scores[task]:.4f}" if task in one.scores else "" for task in tasks]
        rows.append([str(place), one.genome, f"{one.fitness:.4f}", *scores, str(one.number)])
    return columns(rows, left=(1,))
