"""How much smaller and faster the exported student is than its teacher, measured at the end of a distillation."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import torch

from engine.config.places import command
from engine.config.tools import BATCH_SIZES, MeasureConfig
from engine.errors import UserError
from engine.jobs.distill.plan import Plan
from engine.jobs.measure.encoders import compare_encoders
from engine.models.hub import SavedModel
from engine.records.comparison import Comparison
from engine.records.run_dir import RunDir
from engine.train.export import add_comparison

LIMIT_S = 3.0
"""Seconds for each batch size after which no further round begins."""


def compare_with_teacher(
    plan: Plan, run_dir: RunDir, description: dict[str, Any], *, device: torch.device, tell: Callable[[str], None]
) -> Comparison | None:
    """Measures the student of a run beside its teacher, and adds that to its card; None where that cannot be, for want
    of memory beside the training, which `tell` is told.

    description: of the export. Raises RunFailure when the card cannot be written.
    """
    tell("measuring size and speed of student and teacher (measure=false skips this)")
    try:
        comparison = compare_encoders(
            {"teacher": plan.teacher, "student": SavedModel.read("student", str(run_dir.student))},
            device=device,
            seq_len=plan.seq_len,
            batch_sizes=BATCH_SIZES,
            dtype=MeasureConfig.dtype,
            rounds=MeasureConfig.rounds,
            limit_s=LIMIT_S,
        )
    except UserError as error:
        by_hand = f"{command('measure')} --models {shlex.quote(str(run_dir.root))}"
        tell(f"not measured: {error}. To measure by hand: {by_hand}")
        return None
    add_comparison(run_dir, description, comparison)
    return comparison
