"""What became of a job: read from its records and its output, never guessed from the launcher's exit code alone."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from engine.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE
from engine.records.records import SENTINEL, parse_record

Record = dict[str, Any]

TAIL_LINES = 1000
"""Number of lines at the end of the log in which a cause is looked for: the tracebacks of many ranks, interleaved."""
_SHOWN_LINES, _SHOWN_CHARACTERS = 3, 300

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LAUNCHER_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[(?:launch|runner|multinode_runner)\.py:")
_RANK_CODE = re.compile(r"exits with return code = (-?\d+)")
_CLI_ERROR = re.compile(r"^(?:([\w.-]+): )?error: (.+)$")
_NOT_A_HOST = {"srun", "slurmstepd", "salloc", "ninja", "clang", "collect2"}
"""Programs that write `NAME: error: …` too, for other reasons than the configuration."""
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|(?:CUDA|HIP|XPU)(?: error:)? out of memory|CUBLAS_STATUS_ALLOC_FAILED|\bMemoryError\b"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory|oom[-_]kill",
)
_OUT_OF_MEMORY_IF_KILLED = re.compile(r"\boom\b|out of memory", re.IGNORECASE)
_KILLED = (-9, 137, 247)
"""Exit codes that SIGKILL leaves: Popen's, a shell's, and that of `sys.exit(-9)` in the launcher."""


class Outcome(Enum):
    OK = "ok"
    STOPPED = "stopped early"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    TIMEOUT = "timeout"
    BAD_CONFIGURATION = "bad configuration"
    LOST = "lost"


@dataclass(frozen=True)
class JobReport:
    outcomes: dict[str, Outcome]
    """Outcome by genome, in the order asked for."""
    results: dict[str, tuple[Record, ...]]
    """`result` records by genome, one per seed in the order of seeds; not empty, but not of all seeds unless OK."""
    stopped: dict[str, dict[int, float]]
    """Intermediate fitness by genome and step, for those STOPPED."""
    message: str
    """One line for the user."""
    fingerprint: str | None = None
    """Fingerprint that the last start has found; None: it did not come so far."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What that fingerprint is made of, in readable groups."""


def read_job(
    log: Path, records: Path | None, *, genomes: Sequence[str], exit_code: int | None, timed_out: bool
) -> JobReport:
    """Reads what became of each genome. Files that are not there count as empty.

    log: the launcher's output. records: the job's records.jsonl (None: on a disk that this machine does not see).
    genomes: in canonical text form, as records name them (`2-4-6`, not `uniform`). exit_code: the launcher's, None when
    unknown (its driver died).

    A genome is OK when it has a result with a finite fitness for every seed of the last start. Results of an earlier
    start in the same directory count when their fingerprint is the last start's: a proxy job does not repeat them.
    """
    text, found = _Text(), _Records()
    for line in _lines(log):
        if SENTINEL in line:
            found.add(_records_in(line))
        else:
            text.add(line)
    if records is not None:  # after the log: where both have a record, the file's cannot be torn
        from_file = _Records()
        for line in _lines(records):
            from_file.add(_records_in(line))
        found.merge(from_file)
    results = found.results_of(genomes)
    lacking = [genome for genome in genomes if len(results.get(genome, ())) < found.seeds]
    job, why = _cause(text, exit_code, timed_out) if lacking else (Outcome.OK, "")
    own = dict.fromkeys(found.stopped, Outcome.STOPPED) | dict.fromkeys(found.diverged, Outcome.DIVERGED)
    outcomes = {genome: own.get(genome, job) if genome in lacking else Outcome.OK for genome in genomes}
    stopped = {genome: found.stopped[genome] for genome in genomes if outcomes[genome] is Outcome.STOPPED}
    started = found.started or {}
    return JobReport(
        outcomes,
        results,
        stopped,
        _message(outcomes, job, why),
        started.get("fingerprint"),
        started.get("fingerprint_parts", {}),
    )


@dataclass
class _Records:
    """The records of one file that matter here."""

    started: Record | None = None
    results: dict[tuple[str, str, int], Record] = field(default_factory=dict)
    """Records by fingerprint, genome and seed."""
    diverged: set[str] = field(default_factory=set)
    """Genomes that the last start gave up."""
    stopped: dict[str, dict[int, float]] = field(default_factory=dict)
    """Genomes that the last start ended early: intermediate fitness by step."""

    def add(self, records: Iterator[Record]) -> None:
        for record in records:
            kind, status, genome = record["kind"], record.get("status"), str(record.get("genome"))
            if kind == "run" and status == "started":
                self.started = record
                self.diverged.clear()  # they are tried again
                self.stopped.clear()
            elif kind == "error" and status == "diverged":
                self.diverged.add(genome)
            elif kind == "step" and status == "stopped":
                self.stopped[genome] = {int(step): float(value) for step, value in record["reports"].items()}
            elif kind == "result" and _is_finite(record.get("fitness")):
                self.results[str(record.get("fingerprint")), genome, int(record.get("seed", 0))] = record

    def merge(self, other: _Records) -> None:
        self.started = other.started or self.started
        self.results |= other.results
        self.diverged |= other.diverged
        self.stopped |= other.stopped

    @property
    def seeds(self) -> int:
        """Number of results that make a genome complete."""
        return max(1, len(self.started.get("seeds", ()))) if self.started is not None else 1

    def results_of(self, genomes: Sequence[str]) -> dict[str, tuple[Record, ...]]:
        """Returns the results that can be compared with the last start's: one per seed, without genomes that have
        none."""
        wanted = None if self.started is None else str(self.started.get("fingerprint"))
        seeds = None if self.started is None else self.started.get("seeds")
        by_genome: dict[str, dict[int, Record]] = {}
        for (fingerprint, genome, seed), record in self.results.items():
            if wanted in (None, fingerprint) and (seeds is None or seed in seeds):
                by_genome.setdefault(genome, {})[seed] = record
        return {
            genome: tuple(record for _, record in sorted(by_genome[genome].items()))
            for genome in genomes
            if genome in by_genome
        }


@dataclass
class _Text:
    """What the log says beside records."""

    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    error: str | None = None
    """The first `error: …` of a command line: what follows it is its echo."""
    rank_code: int | None = None
    """Exit code of a rank, as the launcher tells it."""

    def add(self, line: str) -> None:
        if not line.strip():
            return
        if code := _RANK_CODE.search(line):
            self.rank_code = int(code.group(1))
        if self.error is None and (error := _CLI_ERROR.match(line)) and error.group(1) not in _NOT_A_HOST:
            self.error = error.group(2).strip()
        self.tail.append(line.rstrip())

    def last(self) -> str:
        """Returns the last lines in one; the launcher's own come after the cause and are left out where there are
        others."""
        telling = [line for line in self.tail if not _LAUNCHER_LINE.search(line)] or list(self.tail)
        shown = " | ".join(line.strip()[:_SHOWN_CHARACTERS] for line in telling[-_SHOWN_LINES:])
        return shown or "no output"


def _cause(text: _Text, exit_code: int | None, timed_out: bool) -> tuple[Outcome, str]:
    """Returns the outcome of the genomes without a result, and what it is known from."""
    killed = exit_code in _KILLED or text.rank_code in _KILLED
    for line in reversed(text.tail):
        if _OUT_OF_MEMORY.search(line) or (killed and _OUT_OF_MEMORY_IF_KILLED.search(line)):
            return Outcome.OUT_OF_MEMORY, line.strip()[:_SHOWN_CHARACTERS]
    if EXIT_BAD_INPUT in (exit_code, text.rank_code):
        return Outcome.BAD_CONFIGURATION, text.error or text.last()
    # 0 and the code of a job that had to be stopped say nothing; any other is a crash, whatever tools wrote before it.
    if text.error is not None and (timed_out or exit_code in (None, EXIT_DONE)):
        return Outcome.BAD_CONFIGURATION, text.error
    if timed_out:
        return Outcome.TIMEOUT, text.last()
    if EXIT_DIVERGED in (exit_code, text.rank_code):
        return Outcome.DIVERGED, text.last()
    if killed:
        return Outcome.LOST, f"a process was killed by signal 9 (out of memory? see dmesg): {text.last()}"
    return Outcome.LOST, text.last()


def _message(outcomes: dict[str, Outcome], job: Outcome, why: str) -> str:
    if job is Outcome.BAD_CONFIGURATION:
        return why
    groups = [
        f"{outcome.value} {' '.join(genome for genome, found in outcomes.items() if found is outcome)}"
        for outcome in Outcome
        if outcome in outcomes.values()
    ]
    is_told = job in outcomes.values() and job not in (Outcome.OK, Outcome.STOPPED, Outcome.DIVERGED)
    return "; ".join(groups) + (f"; {why}" if is_told else "")


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file without colours; a progress bar's carriage return ends a line."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            yield _COLOUR.sub("", line)


def _records_in(line: str) -> Iterator[Record]:
    """Yields all records of a line: ranks that write at once glue theirs, also behind one that is torn."""
    start = line.find(SENTINEL)
    while start >= 0:
        following = line.find(SENTINEL, start + 1)
        if (record := parse_record(line[start:])) is not None:
            yield record
        start = following


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
