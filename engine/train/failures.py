"""Failures of training, in the words of a user's line and in the fields of a record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.train.loss_window import BadMicroStep
from engine.train.step_report import StepReport

MOST_SEQUENCES = 1024
"""Number of sequences of a micro batch that an error record names."""


@dataclass(frozen=True)
class Failure:
    """An `error` record, and what a user reads."""

    status: str
    """Kind of failure: diverged, skipped, checkpoint_failed, out_of_memory or hang."""
    step: int
    """Optimizer step that it is about."""
    text: str = ""
    """Line for the user; empty where another place says it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields of the record."""

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of the record."""
        return {"status": self.status, "step": self.step, **self.facts}


@dataclass(frozen=True)
class BadPlace:
    """The first micro step with a loss that was not finite, by the names that a user knows."""

    at: BadMicroStep
    terms: tuple[str, ...]
    """Names of the terms that were not finite."""
    sequences: tuple[int, ...]
    """Numbers of its sequences in the corpus, or of its rows in the data set."""

    def __str__(self) -> str:
        shown = f"{', '.join(map(str, self.sequences[:8]))}{' …' if len(self.sequences) > 8 else ''}"
        return f"terms: {', '.join(self.terms) or 'total only'}; rank {self.at.rank}, sequences {shown}"

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of a record."""
        return {"rank": self.at.rank, "micro": self.at.micro, "sequences": list(self.sequences[:MOST_SEQUENCES])}


def _diverged(step: int, what: str, more: str = "", **facts: Any) -> Failure:
    text = (
        f"error: {what}. Complete checkpoints, if any, are untouched. Try a lower learning rate or more warm-up in "
        f"another output_dir{more}"
    )
    return Failure("diverged", step, text, facts)


def not_finite(
    report: StepReport, place: BadPlace, bad_steps: list[int], *, skipped: int | None, may_skip: int
) -> Failure:
    """Words losses that were not finite in `bad_steps`. skipped: how many steps this start has left out for that; None
    when it ends here."""
    first = place.at.step
    steps = f"step {first}" if len(bad_steps) == 1 else f"{len(bad_steps)} steps from {first} on"
    what = f"the loss is not finite in {steps} ({place})"
    facts = {
        "terms": list(place.terms),
        **place.facts,
        "bad_steps": bad_steps,
        "lr": report.lr,
        "total": report.total,
    }
    if skipped is None:
        limit = f"; more than train.skip_bad_steps={may_skip} of them" if may_skip else ""
        more = ", or train.skip_bad_steps when single batches are to blame"
        return _diverged(first, what + limit, more, **facts)
    text = f"warning: {what}; left out ({skipped} of at most {may_skip})"
    return Failure("skipped", first, text, {"skipped": skipped, **facts})


def weights_not_finite(step: int) -> Failure:
    """Words weights that are not finite, whatever the losses were."""
    return _diverged(step, f"weights are not finite after step {step}", terms=["weights"])


def outputs_not_finite(step: int) -> Failure:
    """Words outputs of an evaluation that have no score."""
    text = f"error: the model's outputs are not finite after step {step}"
    return Failure("diverged", step, text, {"terms": ["outputs"]})


def scale_exhausted(step: int, place: BadPlace | None) -> Failure:
    """Words gradients that overflow at the smallest loss scale. place: None where the losses were finite."""
    where, facts = ("", {}) if place is None else (f" ({place})", place.facts)
    what = f"gradients overflow fp16 at the smallest loss scale in step {step}{where}"
    terms = [] if place is None else list(place.terms)
    return _diverged(step, what, "; bf16 has a wider range", terms=terms, **facts)


def checkpoint_failed(step: int, why: str, *, goes_on: bool) -> Failure:
    """Words a checkpoint that could not be written. goes_on: training continues without it; else its end says why."""
    text = f"warning: {why}; training goes on, and the next checkpoint is tried as usual" if goes_on else ""
    return Failure("checkpoint_failed", step, text, {"why": why, "goes_on": goes_on})


def out_of_memory(step: int, *, rank: int, why: str, **facts: Any) -> Failure:
    """Words what did not fit. facts: about the micro step, when it was in one."""
    return Failure("out_of_memory", step, facts={"rank": rank, "why": why, **facts})


def hang(step: int, *, rank: int, host: str, limit_s: float, stacks: Path) -> Failure:
    """Words a rank that has finished nothing for `limit_s` seconds."""
    text = (
        f"error: rank {rank} on {host} has finished nothing for {limit_s:g} s after step {step} "
        f"(train.hang_timeout_s); its stacks are in {stacks}"
    )
    return Failure("hang", step, text, {"rank": rank, "host": host, "limit_s": limit_s, "stacks": str(stacks)})
