"""What a search will do and cost: its banner, and --dry_run."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from engine.errors import UserError
from engine.records.columns import duration_text, labelled
from engine.records.flock import Flock, try_flock
from engine.records.run_dir import RunDir
from engine.records.yardstick import Yardstick, is_none
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.jobs.launcher import LOG, end_lost_job
from ga.jobs.outcome import Outcome, read_job
from ga.jobs.pool import JobPool
from ga.jobs.proxy_facts import ProxyFacts
from ga.jobs.slots import Placement, free_port
from ga.study.evaluations import RUNNING, Evaluation, from_records
from ga.study.sources import SearchSource
from ga.study.yardstick import genomes_of, seeds_of

MEASURED, COST, LOCK = "measured", "cost.json", "driver.lock"
LOOK_EVERY_S = 0.2


def describe_search(
    config: SearchConfig,
    space: Space,
    facts: ProxyFacts,
    placements: Sequence[Placement],
    evaluations: Sequence[Evaluation],
) -> str:
    """The banner."""
    s, proxy = config.search, config.proxy
    done = sum(one.counts and one.outcome != RUNNING for one in evaluations)
    rows: list[tuple[str, str | list[str]]] = [
        ("search", f"{config.study}: {s.sampler}, seed {s.seed}"),
        ("space", space.describe()),
        ("budget", f"{s.trials} evaluations" + (f", {done} done already" if done else "")),
        (
            "proxy",
            f"{config.teacher.path}: {proxy.steps} steps x {config.train.global_batch} sequences of {facts.seq_len} of "
            f"{config.data.path}",
        ),
        (
            "fitness",
            f"share of the gap from untrained student to teacher, {', '.join(facts.tasks)} ({proxy.evaluator}), "
            f"weights {'given' if proxy.yardstick else 'measured first'}; {proxy.repeats} seed(s) from {config.seed}",
        ),
        ("fingerprint", facts.fingerprint),
        ("slots", [f"{one}, up to {s.cohort} genomes a job" for one in placements]),
        ("output", config.output_dir),
    ]
    if s.sampler == "ga":
        operators = f"{s.operators.selection} selection, {s.operators.crossover} crossover"
        rows.insert(3, ("generations", f"of {s.operators.population}: {operators}"))
    return labelled(rows + [("note", text) for text in notes(config, space, placements)]) + "\n"


def notes(config: SearchConfig, space: Space, placements: Sequence[Placement]) -> list[str]:
    """What a user would want to know before a long search."""
    s, found = config.search, []
    if space.size() <= s.trials and s.sampler != "exhaustive":
        found.append(
            f"the space has {space.size():,} genomes, no more than the budget of {s.trials}: --search.sampler "
            "exhaustive evaluates them all"
        )
    side_by_side = s.cohort * len(placements)
    if s.sampler == "ga" and s.operators.population < len(placements):
        found.append(
            f"a generation of {s.operators.population} leaves {len(placements) - s.operators.population} of "
            f"{len(placements)} slots idle; search.population={side_by_side} would fill them"
        )
    if s.confirm_top == 0:
        found.append("search.confirm_top=0: the report cannot tell the winner from seed noise")
    return found


def rehearse(config: SearchConfig, space: Space, facts: ProxyFacts, pool: JobPool, *, stop: Callable[[], bool]) -> None:
    """Prints what the search would do, with the cost of one job that is really run. Its results are not lost: the
    search takes them over."""
    print(describe_search(config, space, facts, pool.placements, ()), flush=True)
    s, slots = config.search, len(pool.placements)
    study = optuna.create_study(direction="maximize")
    source = SearchSource(study, space, s, proxy_seed=config.seed)
    batch = source.batch(())
    size = min(s.cohort, math.ceil(batch / slots))
    first = first_genomes(source, size)
    cost = measure(config, facts, pool, first, stop=stop)
    if cost is None:
        return
    seconds, baselines = cost
    with_none = not config.proxy.yardstick and not any(map(is_none, first))  # the job has measured a yardstick
    each = (seconds - baselines) / (len(first) + with_none)
    rounds = math.ceil(math.ceil(batch / size) / slots)  # of a generation; the other samplers have one
    total = each * size * rounds * s.trials / batch
    confirmation = each * s.confirm_seeds * (s.confirm_top + 1) / slots
    yardstick = 0.0 if config.proxy.yardstick else len(seeds_of(config)) * (len(genomes_of(space)) * each + baselines)
    folder = config.root / "trials" / "00000"
    words = pool.words(pool.placements[0], folder, free_port())
    rows = [
        ("measured", f"{seconds:.0f} s for a job of {len(first)}: {' '.join(first)} ({config.root / MEASURED})"),
        (
            "estimate",
            f"{each:.1f} s per evaluation; {s.trials} on {slots} slot(s) take "
            f"{duration_text(total)}, the yardstick before them about {duration_text(yardstick / slots)}, the "
            f"confirmation about {duration_text(confirmation)}",
        ),
        ("first jobs", [shlex.join(words)]),
    ]
    print(labelled(rows), flush=True)


def first_genomes(source: SearchSource, count: int) -> list[str]:
    """Of the first job of the search, whose study is new."""
    source.start()
    count = min(count, source.space.size())
    return list(dict.fromkeys(source.proposal(source.study.ask()).genome for _ in range(count)))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other drivers out of the measured job's folder, until the end of the block or of this process, where the
    file system has flock. Raises UserError when another one is in there."""
    with (folder / LOCK).open("ab") as file:
        if try_flock(file) is Flock.HELD:
            raise UserError(
                f"another --dry_run is measuring in {folder}; wait until it has ended, stop it, or name another "
                "output_dir"
            )
        yield


def end_lost_measurement(config: SearchConfig) -> None:
    """Ends the job of a --dry_run that was killed. That of a living one is left alone; another --dry_run raises
    UserError then."""
    folder = config.root / MEASURED
    if not folder.is_dir():
        return
    try:
        with _alone_in(folder):
            end_lost_job(folder)
    except UserError:
        if config.dry_run:
            raise


def measure(
    config: SearchConfig, facts: ProxyFacts, pool: JobPool, genomes: Sequence[str], *, stop: Callable[[], bool]
) -> tuple[float, float] | None:
    """Seconds that a job of these genomes takes, and how many of them baselines take; None when told to stop. Raises
    UserError when it fails, or another driver is measuring."""
    folder = config.root / MEASURED
    folder.mkdir(exist_ok=True)
    with _alone_in(folder):
        return _measure_in(folder, config, facts, pool, genomes, stop=stop)


def _measure_in(
    folder: Path,
    config: SearchConfig,
    facts: ProxyFacts,
    pool: JobPool,
    genomes: Sequence[str],
    *,
    stop: Callable[[], bool],
) -> tuple[float, float] | None:
    key = [facts.fingerprint, config.seed, config.proxy.repeats, list(genomes)]
    cost = _read_cost(folder)
    if cost is not None and cost["of"] == key:
        return cost["seconds"], cost["baselines"]
    end_lost_job(folder)
    print(f"running one job of {len(genomes)} genomes to measure its cost ...", flush=True)
    began = time.monotonic()
    proxy = replace(config.proxy, other_tasks=[])  # as the search's trials have it
    job = config.job(output_dir=str(folder.resolve()), genomes=list(genomes), resume="never", proxy=proxy)
    running = pool.start(pool.placements[0], job)
    while not (done := list(pool.finished())):
        if stop():
            pool.end(running)
            return None
        time.sleep(LOOK_EVERY_S)
    seconds = time.monotonic() - began
    report = done[0][1]
    if any(outcome is not Outcome.OK for outcome in report.outcomes.values()):
        raise UserError(f"the measured job failed: {report.message} ({folder})")
    baselines = float(report.results[genomes[0]][0]["wall_s"].get("baselines", 0.0))
    draft = folder / f"{COST}.draft"
    draft.write_text(json.dumps({"of": key, "seconds": seconds, "baselines": baselines}), encoding="utf-8")
    draft.replace(folder / COST)
    return seconds, baselines


def _read_cost(folder: Path) -> dict[str, Any] | None:
    """What an earlier --dry_run has measured there."""
    try:
        cost: dict[str, Any] = json.loads((folder / COST).read_text(encoding="utf-8"))
        return cost if {"of", "seconds", "baselines"} <= cost.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def measured_evaluations(config: SearchConfig, facts: ProxyFacts, yardstick: Yardstick) -> dict[str, Evaluation]:
    """What --dry_run has evaluated, by genome, if it can be compared."""
    folder = config.root / MEASURED
    cost = _read_cost(folder)
    if cost is None:
        return {}
    fingerprint, seed, repeats, genomes = cost["of"]
    if [fingerprint, seed, repeats] != [facts.fingerprint, config.seed, config.proxy.repeats]:
        return {}
    records = RunDir(folder).records
    report = read_job(folder / LOG, records, genomes=genomes, exit_code=None, timed_out=False)
    complete = [genome for genome in genomes if report.outcomes[genome] is Outcome.OK]
    return {genome: from_records(genome, report.results[genome], yardstick, job=str(folder)) for genome in complete}
