"""The course of a run so far, read from its records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.records.records import read_records


@dataclass
class History:
    """What the step records of a run say, those of earlier starts included. Rank 0 only."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step records by step; of a step that was run twice, the later one."""
    first_held_out: dict[str, Any] | None = None
    """The first held-out losses: step, total, terms."""
    held_out: dict[str, Any] | None = None
    """The last held-out losses: step, total, terms."""

    @classmethod
    def read(cls, path: Path, until: int, labels: Mapping[str, Any] = MappingProxyType({})) -> History:
        """Reads the records of the steps up to `until`: later ones belong to a future that is run again. labels: fields
        that tell the records of this model from those of others."""
        history = cls()
        for record in read_records(path) if path.is_file() else ():
            if any(record.get(name) != value for name, value in labels.items()):
                continue
            if record["kind"] == "step" and record["step"] <= until:
                history.add(record)
        return history

    def add(self, record: dict[str, Any]) -> None:
        if "held_out" in record:
            self.held_out = {"step": record["step"], **record["held_out"]}
            self.first_held_out = self.first_held_out or self.held_out
        elif "total" in record:
            self.steps[record["step"]] = record

    @property
    def first(self) -> dict[str, Any]:
        return self.steps[min(self.steps)]

    @property
    def last(self) -> dict[str, Any]:
        return self.steps[max(self.steps)]

    @property
    def peak_memory_gib(self) -> float:
        return max(float(record["peak_memory_gib"]) for record in self.steps.values())

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of the training time by phase, on rank 0."""
        sums: dict[str, float] = defaultdict(float)
        for record in self.steps.values():
            for phase, share in record["time_share"].items():
                sums[phase] += share * record["seconds"]
        return dict(sums)

    @property
    def tokens_per_s(self) -> float:
        """Mean over the training time; checkpoints and evaluations are left out."""
        seconds = sum(record["seconds"] for record in self.steps.values())
        return float(sum(record["tokens"] for record in self.steps.values()) / seconds)
