"""What a proxy job prints: its banner, the fitness table, and how far that can be trusted; and its earlier results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from engine.jobs.proxy.plan import ProxyPlan
from engine.ranks.runtime import Runtime
from engine.records.columns import columns, counted, labelled_lines
from engine.records.records import read_records
from engine.records.stats import Signal, describe, signal_ratio
from engine.records.yardstick import Yardstick, beaten_text, counting_tasks, describe_yardstick
from engine.tasks.beir import RetrievalSplit
from engine.tasks.load import TaskData

MEASURED_FIRST = (
    "share of the gap between the untrained student and the teacher, which are scored first; none is distilled too"
)
Result = dict[str, Any]
"""A `result` record of one genome and seed."""


def earlier_results(records: Path, fingerprint: str) -> dict[tuple[str, int], Result]:
    """Returns the results of all starts whose fingerprint makes them comparable, by genome and seed; of several the
    last."""
    results: dict[tuple[str, int], Result] = {}
    for record in read_records(records) if records.is_file() else ():
        if record["kind"] == "result" and record.get("fingerprint") == fingerprint:
            results[record["genome"], record["seed"]] = record
    return results


def signal_of(results: Sequence[Result]) -> Signal | None:
    """Returns how much of the differences between genomes is no seed noise; None without repeated seeds of at least two
    genomes."""
    fitness: dict[str, dict[int, float]] = defaultdict(dict)
    for result in results:
        if result["steps"]:  # an untrained student has no seed noise, and would make it look smaller than it is
            fitness[result["genome"]][result["seed"]] = result["fitness"]
    return signal_ratio(fitness)


def _by_genome(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result["genome"]].append(result)
    return groups


def fitness_table(
    results: Sequence[Result],
    names: dict[str, str],
    failed: Sequence[str],
    yardstick: Yardstick,
    *,
    tasks: Sequence[str],
) -> str:
    """Returns a table with the best genome first, then the baselines; means over seeds, with the sample standard
    deviation where there are several. Tasks that do not count are in brackets.

    names: what the user called each genome. failed: lines about genomes without a result. tasks: in the order of the
    columns.
    """
    by_genome = _by_genome(results)
    order = sorted(by_genome, key=lambda genome: -fmean(r["fitness"] for r in by_genome[genome]))
    counting = counting_tasks(yardstick) or list(yardstick)
    heads = ["genome", "", *(task if task in counting else f"({task})" for task in tasks), "fitness", "seeds"]
    rows = [heads]
    for genome in order:
        group = by_genome[genome]
        given = names.get(genome, genome)
        cells = [_mean_and_deviation([r["scores"][task] for r in group]) for task in tasks]
        fitness = _mean_and_deviation([r["fitness"] for r in group])
        rows.append([genome, given if given != genome else "", *cells, fitness, str(len(group))])
    for name in ("start", "teacher") if results else ():
        cells = [f"{getattr(yardstick[task], name):.4f}" if task in yardstick else "" for task in tasks]
        rows.append([name, "", *cells, f"{float(name == 'teacher'):.4f}" if counting_tasks(yardstick) else "", ""])
    rows += [[text] for text in failed]
    return columns(rows, left=(0, 1))


def closing_text(
    results: Sequence[Result],
    names: dict[str, str],
    failed: Sequence[str],
    yardstick: Yardstick,
    *,
    tasks: Sequence[str],
) -> str:
    """Returns first whether the students are better than no training at all, then the table, what a fitness is, and how
    far it can be trusted. Arguments as for `fitness_table`."""
    signal = signal_of(results)
    parts = [
        beaten_text(_scores_by_genome(results, yardstick), yardstick),
        fitness_table(results, names, failed, yardstick, tasks=tasks),
    ]
    parts += [f"fitness: {describe_yardstick(yardstick)}"] if results else []
    parts += [describe(signal)] if signal is not None else []
    return "\n\n".join(part for part in parts if part)


def _scores_by_genome(results: Sequence[Result], tasks: Iterable[str]) -> dict[str, dict[str, float]]:
    """Returns means over seeds, by genome and task."""
    return {
        genome: {task: fmean(result["scores"][task] for result in group) for task in tasks}
        for genome, group in _by_genome(results).items()
    }


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _evaluator_text(plan: ProxyPlan) -> str:
    if plan.own_evaluator is not None:
        return f"own, {getattr(plan.own_evaluator, '__qualname__', type(plan.own_evaluator).__qualname__)}"
    folds = plan.config.proxy.folds
    if plan.config.proxy.evaluator == "probe":
        if all(task.spec.is_zero_shot for task in plan.tasks):
            return "probe, by cosine: nothing is trained"
        return f"probe, {folds}-fold cross-validation"
    return f"finetune, scored on one row in {folds}"


def _task_text(task: TaskData) -> str:
    """Returns what of a task makes its score."""
    rows = task.splits["train"]
    size = f"{len(rows):,} training rows"
    if isinstance(rows, RetrievalSplit):
        size = f"{len(rows):,} queries, {len(rows.corpus):,} documents"
    elif not task.spec.trainable:
        size = f"{len(rows):,} rows"
    return f"{task.spec.name}: {size}, {' + '.join(task.spec.counted_metrics)}"


def describe_start(plan: ProxyPlan, runtime: Runtime, seeds: Sequence[int], known: Collection[tuple[str, int]]) -> str:
    """Returns the banner. known: genome and seed of the results that are there already."""
    config, base, proxy = plan.config, plan.base, plan.config.proxy
    t, s, ex = base.teacher_shape, base.student_shape, base.execution
    pairs = [(genome.key, seed) for seed in seeds for genome in plan.genomes]
    done = sum(pair in known for pair in pairs)
    genomes = [genome.key + ("" if genome.given == genome.key else f"  ({genome.given})") for genome in plan.genomes]
    tasks = [
        _task_text(task) + ("" if task.spec.name in plan.counted else " (does not count)") for task in plan.tasks
    ] or list(plan.scored)
    positions = proxy.steps * config.train.global_batch * base.seq_len
    rows: list[tuple[str, str | list[str]]] = [
        ("teacher", f"{config.teacher.path}: {t.layers} layers, width {t.width}, {base.teacher_dtype}"),
        (
            "student",
            f"{s.layers} layers, width {s.width}, init {config.student.init or config.student.path or 'random'}",
        ),
        ("genomes", genomes),
        (
            "distil",
            f"{proxy.steps} steps x {config.train.global_batch} sequences of {base.seq_len} = {positions / 1e6:.2f} M "
            f"positions of {config.data.path}, lr {config.train.lr:g}",
        ),
        (
            "evaluator",
            _evaluator_text(plan) + (f", also after steps {proxy.report_at}" if proxy.report_at else ""),
        ),
        ("tasks", tasks),
        ("fitness", describe_yardstick(proxy.yardstick) if proxy.yardstick else MEASURED_FIRST),
        ("seeds", ", ".join(map(str, seeds)) + (f"; {done} of {len(pairs)} results exist already" if done else "")),
        (
            "execution",
            f"{ex.precision}, ZeRO stage {ex.zero_stage} ({ex.source}), {counted(runtime.world_size, 'rank')}, "
            f"{runtime.where}",
        ),
        ("kernels", base.kernels.describe(base.config.loss.active)),
        ("fingerprint", plan.fingerprint),
        ("output", config.output_dir),
    ]
    rows += [("warning", text) for text in plan.warnings]
    return labelled_lines(rows) + "\n"
