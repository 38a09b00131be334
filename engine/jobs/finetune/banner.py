"""The banner of a fine-tuning job: what it will do, printed before it begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from engine.jobs.execution import versions
from engine.jobs.finetune.plan import FinetunePlan, PlannedTask
from engine.mapping import mapping_table
from engine.models import hub
from engine.records.columns import counted, labelled_lines
from engine.tasks.evaluation import constant_answer
from engine.tasks.rows import Split
from engine.train.optim import parameters_of

MOST_LABELS = 12
"""Labels of a task that are counted in the banner."""


def describe_job(plan: FinetunePlan, *, optimizer: str, device: str, finished: int, unfinished: Sequence[str]) -> str:
    """Returns the banner. finished: number of fine-tunings that an earlier start completed. unfinished: those that are
    continued, with the step."""
    config, shape = plan.config, plan.shape
    parameters = parameters_of(hub.skeleton(plan.model.config, "none"))
    backends = {f"attention {task.backend.name} ({task.backend.reason})": None for task in plan.tasks}
    kept = f", {finished} of them already finished" if finished else ""
    how = next(iter(plan.executions.values()))
    rows: list[tuple[str, str | Sequence[str]]] = [
        ("versions", versions()),
        (
            "model",
            [
                f"{plan.model.path}: {plan.model.config.model_type}, {shape.layers} layers, width {shape.width}, "
                f"{shape.heads} heads, {parameters / 1e6:.1f} M parameters",
                *backends,
            ],
        ),
        ("tasks", [line for task in plan.tasks for line in _task_lines(plan, task)]),
    ]
    if plan.absent:
        rows.append(("absent", f"{', '.join(plan.absent)}: no folder under {config.task.data_dir}"))
    rows += [
        (
            "schedule",
            f"{config.train.schedule}, {config.task.warmup_share:.0%} warm-up, dropout {config.task.dropout:g}",
        ),
        ("stopping", _stopping(plan)),
        ("losses", _losses(plan)),
    ]
    rows += [("teacher", _teacher_lines(plan))] if any(task.teacher for task in plan.tasks) else []
    rows += [
        ("runs", _runs(plan, kept)),
        ("batch", [_batch_line(plan, batch) for batch in plan.executions]),
        ("execution", f"{how.precision}, ZeRO stage {how.zero_stage} ({how.source}), {device}"),
        ("optimizer", optimizer),
        ("start", [f"continues {line}" for line in unfinished] or ("goes on" if finished else "fresh")),
        ("output", config.output_dir),
    ]
    rows += [("trackers", ", ".join(how.trackers))] if how.trackers else []
    rows += [("warning", text) for text in plan.warnings]
    return labelled_lines(rows) + "\n"


def _task_lines(plan: FinetunePlan, task: PlannedTask) -> list[str]:
    spec = task.data.spec
    dev = " + ".join(f"{len(task.data.splits[name]):,}" for name in spec.dev_splits)
    kind = f"{len(spec.labels)} labels" if spec.kind == "classification" else spec.kind
    values: dict[str, Iterable[float]] = {
        "epochs": dict.fromkeys(at.epochs for at in task.points),
        "lr": dict.fromkeys(at.lr for at in task.points),
        "batch": dict.fromkeys(at.batch for at in task.points),
    }
    chosen = ", ".join(f"{name} {' | '.join(f'{value:g}' for value in grid)}" for name, grid in values.items())
    line = (
        f"{spec.name}: {task.train_rows:,} training rows, {dev} dev rows; {kind}; score: {' and '.join(spec.metrics)}; "
        f"{chosen}, {task.seq_len} tokens"
    )
    constant = constant_answer(task.data)
    scores = ", ".join(f"{name} {100 * value:.2f}" for name, value in constant.metrics.items())
    lines = [line, f"  to beat: {scores} on the dev rows, by always answering {constant.answer}"]
    return [*lines, f"  labels of the training rows: {_label_counts(task)}"] if spec.labels else lines


def _runs(plan: FinetunePlan, kept: str) -> str:
    """Returns how much there is to do; a span task has more steps, since its rows may have several windows."""
    steps = sum(plan.train_config(unit, unit.task.train_rows).steps for unit in plan.units)
    least = "at least " if any(task.data.spec.kind == "span" for task in plan.tasks) else ""
    seeds = "seed" if len(plan.config.task.seeds) == 1 else "seeds"
    return (
        f"{counted(len(plan.units), 'fine-tuning')}{kept}; {seeds} {', '.join(map(str, plan.config.task.seeds))}; "
        f"{least}{counted(steps, 'step')} in all (the first ones show how long that takes)"
    )


def _label_counts(task: PlannedTask) -> str:
    """Returns the labels of the training rows with their counts, the most frequent ones first."""
    split = task.data.splits["train"]
    assert isinstance(split, Split)
    assert split.labels is not None
    counts = Counter(task.data.spec.labels[label] for label in split.labels).most_common()
    more = f" and {len(counts) - MOST_LABELS} more" if len(counts) > MOST_LABELS else ""
    return ", ".join(f"{label!r} {count:,}" for label, count in counts[:MOST_LABELS]) + more


def _stopping(plan: FinetunePlan) -> str:
    task = plan.config.task
    when = f"every {task.eval_every} steps" if task.eval_every is not None else "after each epoch"
    if task.patience is None:
        return f"none; scores {when}, the last one counts"
    return f"after {task.patience} scores ({when}) without a better one; the best one counts"


def _losses(plan: FinetunePlan) -> str:
    loss = plan.config.loss
    if plan.config.teacher.path is None:
        return f"labels {loss.labels:g}"
    weights = {"labels": loss.labels} | loss.active
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight > 0) + (
        f"; temperature {loss.temperature:g}"
    )


def _teacher_lines(plan: FinetunePlan) -> list[str]:
    lines: dict[str, None] = {}
    for task in plan.tasks:
        if task.teacher is None:
            continue
        saved = task.teacher.saved
        shape = hub.shape_of(saved.config, has_mlm_head=False)
        lines[
            f"{saved.path}: {saved.config.model_type}, {shape.layers} layers, width {shape.width}, "
            f"{task.teacher.dtype}, attention {task.teacher.backend.name} ({task.teacher.backend.reason})"
        ] = None
        if task.teacher.maps:
            lines |= dict.fromkeys(mapping_table(task.teacher.maps["hidden"], task.teacher.maps["attention"]))
    return list(lines)


def _batch_line(plan: FinetunePlan, batch: int) -> str:
    how = plan.executions[batch]
    return f"{batch} rows = {how.micro_batch_size} micro batch x {how.grad_accum_steps} accumulation x " + counted(
        how.world_size, "rank"
    )
