"""Logs of jobs that ended in every way. tests/golden/job_logs/CASE holds output.log, records.jsonl where there is one,
and case.json: what the driver knew, and what it must conclude."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from engine.records.records import format_record
from ga.jobs.outcome import JobReport, Outcome, read_job

GOLDEN = ROOT / "tests" / "golden" / "job_logs"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
GENOMES = ("2-4-6", "0-3-6")


def report_of(folder: Path, case: dict[str, Any]) -> JobReport:
    records = folder / "records.jsonl"
    known = {key: case[key] for key in ("genomes", "exit_code", "timed_out")}
    return read_job(folder / "output.log", records if records.exists() else None, **known)


def test_there_is_a_case_for_every_outcome() -> None:
    seen = {
        name for case in CASES for name in json.loads((GOLDEN / case / "case.json").read_text())["outcomes"].values()
    }
    assert seen == {outcome.value for outcome in Outcome}


@pytest.mark.parametrize("name", CASES)
def test_golden_log(name: str) -> None:
    case = json.loads((GOLDEN / name / "case.json").read_text())
    report = report_of(GOLDEN / name, case)
    assert {genome: outcome.value for genome, outcome in report.outcomes.items()} == case["outcomes"]
    assert {g: [r["fitness"] for r in found] for g, found in report.results.items()} == case["fitness"]
    assert report.message == case["message"]
    assert "\n" not in report.message


@pytest.mark.parametrize("name", ["ok", "ok_pdsh"])
def test_a_log_cut_anywhere_never_gives_a_wrong_result(name: str, tmp_path: Path) -> None:
    whole = (GOLDEN / name / "output.log").read_bytes()
    log = tmp_path / "output.log"
    full = read_job(GOLDEN / name / "output.log", None, genomes=GENOMES, exit_code=0, timed_out=False)
    counts = set()
    for cut in range(0, len(whole), 83):
        log.write_bytes(whole[:cut])
        report = read_job(log, None, genomes=GENOMES, exit_code=0, timed_out=False)
        counts.add(len(report.results))
        for genome in GENOMES:
            if report.outcomes[genome] is Outcome.OK:
                assert report.results[genome] == full.results[genome]
            else:
                assert report.outcomes[genome] is Outcome.LOST
                assert genome not in report.results
    assert counts == {0, 1, 2}


def write_log(folder: Path, *lines: str) -> Path:
    log = folder / "output.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


def test_a_result_without_a_finite_fitness_is_none(tmp_path: Path) -> None:
    log = write_log(tmp_path, format_record("result", genome="2-4-6", seed=0, fingerprint="f", fitness=float("nan")))
    report = read_job(log, None, genomes=["2-4-6"], exit_code=0, timed_out=False)
    assert report.outcomes == {"2-4-6": Outcome.LOST}
    assert not report.results


def test_results_of_genomes_that_were_not_asked_for_are_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path, *[format_record("result", genome=g, seed=0, fitness=0.5) for g in GENOMES])
    report = read_job(log, None, genomes=["0-3-6"], exit_code=0, timed_out=False)
    assert list(report.results) == ["0-3-6"]
    assert report.message == "ok 0-3-6"


def test_a_genome_that_diverged_in_an_earlier_start_is_judged_by_the_last(tmp_path: Path) -> None:
    started = format_record("run", status="started", fingerprint="f", seeds=[0])
    diverged = format_record("error", status="diverged", genome="2-4-6", seed=0)
    assert report_for(write_log(tmp_path, started, diverged)) is Outcome.DIVERGED
    assert report_for(write_log(tmp_path, started, diverged, started)) is Outcome.LOST


def report_for(log: Path) -> Outcome:
    return read_job(log, None, genomes=["2-4-6"], exit_code=1, timed_out=False).outcomes["2-4-6"]


@pytest.mark.parametrize(
    ("exit_code", "timed_out", "line", "outcome"),
    [
        (0, False, "error: lr=-1: must be > 0", Outcome.BAD_CONFIGURATION),
        (0, False, "worker-1: \x1b[31merror: lr=-1: must be > 0\x1b[0m", Outcome.BAD_CONFIGURATION),
        (1, False, "error: lr=-1: must be > 0", Outcome.LOST),  # a crash: some tool's error came before it
        (0, False, "srun: error: n1: task 0: Exited with exit code 2", Outcome.LOST),
        (0, False, "/tmp/x.cpp:3:1: error: expected ';'", Outcome.LOST),
        (2, False, "no such line", Outcome.BAD_CONFIGURATION),
        (None, True, "step 5", Outcome.TIMEOUT),
        (-9, False, "the room: kitchen", Outcome.LOST),  # "oom" inside a word
        (-9, False, "Memory cgroup out of memory: Killed process 7", Outcome.OUT_OF_MEMORY),
        (1, False, "warning: may run out of memory", Outcome.LOST),
    ],
)
def test_cause(exit_code: int | None, timed_out: bool, line: str, outcome: Outcome, tmp_path: Path) -> None:
    log = write_log(tmp_path, line)
    assert read_job(log, None, genomes=["1"], exit_code=exit_code, timed_out=timed_out).outcomes == {"1": outcome}
