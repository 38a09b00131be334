"""What a distillation prints when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.records.columns import counted, labelled_lines
from engine.records.comparison import Comparison
from engine.records.history import History
from engine.records.run_dir import RunDir, step_tag


def describe_end(
    run_dir: RunDir,
    history: History,
    last: Mapping[str, Any],
    held_out: Mapping[str, Any] | None,
    comparison: Comparison | None,
    *,
    ranks: int,
    why: str | None,
) -> str:
    """Returns the losses, what the student is worth, and where things are.

    last, held_out: what is recorded of the student's step. why: it is that one; None: it is the last.
    """
    first = history.first
    facts: list[tuple[str, str | list[str]]] = [
        (
            "speed",
            f"{history.tokens_per_s:,.0f} tokens/s over {counted(ranks, 'rank')}, "
            f"peak {history.peak_memory_gib:.2f} GiB",
        ),
        ("student", [f"{run_dir.student}   (AutoModel.from_pretrained)", *([why] if why else [])]),
        ("checkpoint", str(run_dir.checkpoints / step_tag(last["step"]))),
        ("tensorboard", f"tensorboard --logdir {run_dir.root}"),
    ]
    if comparison is not None:
        facts.insert(1, ("vs teacher", f"{comparison.summary} ({comparison.seq_len} tokens, {comparison.dtype})"))
    if held_out is not None and history.first_held_out is not None:
        before, now = (f"{of['total']:.4g} at step {of['step']}" for of in (history.first_held_out, held_out))
        facts.insert(0, ("held out", f"loss {now}, {before}"))
    return closing_table(
        {"total": first["total"], **first["losses"]},
        {"total": last["total"], **last["losses"]},
        facts,
        steps=(first["step"], last["step"]),
    )


def closing_table(
    first: dict[str, float],
    last: dict[str, float],
    facts: Sequence[tuple[str, str | list[str]]],
    *,
    steps: tuple[int, int],
) -> str:
    """Returns a table of the first and last logged value of each loss (at `steps`), and the facts below it."""
    width = max(len(name) for name in [*first, "loss"]) + 2
    heads = [f"step {step}" for step in steps]
    lines = [f"{'loss':<{width}}{heads[0]:>12}{heads[1]:>12}{'ratio':>8}"]
    for name, value in first.items():
        ratio = f"{last[name] / value:.3f}" if value else "-"
        lines.append(f"{name:<{width}}{value:>12.4g}{last[name]:>12.4g}{ratio:>8}")
    return "\n".join([*lines, "", labelled_lines(facts)])
