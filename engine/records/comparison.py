"""Sizes and speed of encoders beside the first of them, as a record, a table and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.records.columns import counted

Speedup = tuple[float, float, float]
"""How many times as fast as the first encoder: median, least and most of the rounds."""


@dataclass(frozen=True, kw_only=True)
class MeasuredEncoder:
    """An encoder without pooler and heads."""

    name: str
    parameters: int
    parameters_beside_embeddings: int
    """Parameters that are not in a table of embeddings (words, positions, token types)."""
    disk_mib: float
    """MiB of its weight files, with pooler and heads where they have them."""
    memory_mib: float | None
    """MiB of its weights and buffers in memory; None for an ONNX file, which onnxruntime does not tell it of."""
    ms: Sequence[float]
    """Median milliseconds of a forward pass, for each batch size."""
    speedup: Sequence[Speedup]
    """For each batch size."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Encoders, measured in turns; the first is what the others are compared with."""

    encoders: Sequence[MeasuredEncoder]
    batch_sizes: Sequence[int]
    seq_len: int
    """Tokens of each sequence; there are no pads."""
    dtype: str
    rounds: Sequence[int]
    """Turns that were timed, for each batch size."""
    machine: str
    """Device, threads and versions."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Comparison:
        """Reads what `dataclasses.asdict` made of one."""
        encoders = [MeasuredEncoder(**encoder) for encoder in record["encoders"]]
        return cls(**{**record, "encoders": encoders})

    @property
    def conditions(self) -> str:
        """How it was measured, in a line"""
        rounds = " and ".join(counted(number, "round") for number in dict.fromkeys(self.rounds))
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"{self.dtype} forward passes over {sizes} x {self.seq_len} tokens in turns, medians of {rounds}; "
            f"{self.machine}"
        )

    def rows(self) -> list[list[str]]:
        """Returns a table: a column for each encoder, a row for each quantity; the others' shares of the first stand
        behind their sizes."""
        rows = [
            ["", *(encoder.name for encoder in self.encoders)],
            self._sizes("parameters", lambda one: one.parameters, ",d"),
            self._sizes("without embeddings", lambda one: one.parameters_beside_embeddings, ",d"),
            self._sizes("MiB on disk", lambda one: one.disk_mib, ".1f"),
            self._sizes("MiB in memory", lambda one: one.memory_mib, ".1f"),
        ]
        for i, batch in enumerate(self.batch_sizes):
            rows.append([f"batch {batch}: ms", *(f"{one.ms[i]:.2f}" for one in self.encoders)])
            rows.append([f"batch {batch}: sequences/s", *(f"{1000 * batch / one.ms[i]:,.1f}" for one in self.encoders)])
            others = [f"{mid:.2f} ({low:.2f} to {high:.2f})" for mid, low, high in self._speedups(i)]
            rows += [[f"batch {batch}: times as fast", "1", *others]] if others else []
        return rows

    def _speedups(self, i: int) -> list[Speedup]:
        return [encoder.speedup[i] for encoder in self.encoders[1:]]

    def _sizes(self, label: str, size: Callable[[MeasuredEncoder], float | None], form: str) -> list[str]:
        first = size(self.encoders[0])
        assert first is not None
        found = (size(one) for one in self.encoders[1:])
        others = ("" if number is None else f"{number:{form}} ({number / first:.0%})" for number in found)
        return [label, f"{first:{form}}", *others]

    @property
    def summary(self) -> str:
        """What the second encoder is beside the first"""
        first, second = self.encoders[:2]
        speeds = (
            f"{mid:.1f} times as fast at batch {batch}"
            for batch, (mid, _, _) in zip(self.batch_sizes, second.speedup, strict=True)
        )
        return f"{second.parameters / first.parameters:.0%} of the parameters, {', '.join(speeds)}"
