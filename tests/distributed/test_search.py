"""Whole searches: real drivers, the real launcher, tiny models."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from launching import Run
from postgres import Cluster
from searching import SearchRun, finish

from ga.study.evaluations import REPEATED

MakeSearch = Callable[..., SearchRun]
SPACE = 25
"""Genomes: 2 student layers, 4 teacher layers or none."""


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, f"ended early:\n{process.stdout.read()[-4000:] if process.stdout else ''}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_search_from_start_to_a_distillation_with_its_winner(make_search: MakeSearch, tmp_path: Path) -> None:
    search = make_search("whole", trials=8, population=4, cohort=4, confirm_top=1, confirm_seeds=2)
    rehearsed = search.finish("--dry_run")
    assert "25 genomes" in rehearsed
    assert "s per evaluation" in rehearsed
    assert not (search.output_dir / "trials").exists()
    output = search.finish()
    found = search.evaluations()
    assert len({one.genome for one in found}) == len(found) == 8
    assert all(one.outcome == "ok" and one.by_seed == {0: one.fitness} for one in found), found
    assert {one.generation for one in found} == {0, 1, 2} or {one.generation for one in found} == {0, 1}
    measured = [one for one in found if one.seconds == 0.0]  # taken over from --dry_run
    assert len(measured) == 4
    assert search.results().total() == 4
    for text in ("generation 0", "best ", "8 of 8", "REPORT.md"):
        assert text in output, output
    report = search.output_dir / "report"
    assert {"REPORT.md", "leaderboard.csv"} <= {path.name for path in report.iterdir()}
    assert list((search.output_dir / "tensorboard").rglob("events.out.tfevents.*"))
    assert "8 of 8 done" in search.finish("--status")

    folders = search.folders()
    search.finish()
    assert search.folders() == folders, "finished trials were run again"

    best = report / "best.yaml"
    assert yaml.safe_load(best.read_text())["mapping"]["hidden"] in {one.genome for one in found}
    steps = ["--train.steps", "2", "--train.warmup_steps", "1", "--train.global_batch", "4"]
    run = Run(tmp_path / "distilled", argv=["--config", str(best), *steps], launcher=False)
    run.finish()
    assert (run.run_dir.student / "model.safetensors").is_file()

    changed = search.finish("--proxy.steps", "5", expect=2)
    assert changed.count("error: ") == 1
    assert "fingerprint" in changed
    assert "training" in changed


def test_two_drivers_share_a_search_on_sqlite(make_search: MakeSearch) -> None:
    share_a_search(make_search("shared", sampler="exhaustive", trials=SPACE, cohort=7, confirm_top=0), SPACE)


def test_two_drivers_share_a_search_on_postgresql(make_search: MakeSearch, postgres: Cluster) -> None:
    storage = postgres.url("searches")
    settings = {"trials": 12, "cohort": 3, "confirm_top": 1, "confirm_seeds": 2}
    share_a_search(make_search("shared", sampler="random", storage=storage, **settings), 12)


def share_a_search(search: SearchRun, trials: int) -> None:
    drivers = [search.start(), search.start()]
    for driver in drivers:
        finish(driver)
    assert {one.outcome for one in search.evaluations()} == {"ok"}
    results = search.results()
    assert len(results) == trials
    assert set(results.values()) == {1}, "a genome was run twice"
    commands = [(folder / "cmd.txt").read_text() for folder in search.folders()]
    ports = [command.split("--master_port")[1].split()[0] for command in commands]
    assert len(set(ports)) == len(ports)


def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(make_search: MakeSearch) -> None:
    search = make_search("stopped", sampler="random", trials=4, cohort=2, local_slots=2, confirm_top=0)
    driver = search.start()
    trials = search.output_dir / "trials"
    wait_until(lambda: trials.exists() and len(list(trials.glob("*/output.log"))) == 2, driver)  # side by side
    driver.send_signal(signal.SIGINT)
    output = finish(driver, expect=130)
    assert "the same command goes on" in output
    assert not search.job_processes()
    search.finish()
    assert {one.outcome for one in search.evaluations()} == {"ok"}
    assert set(search.results().values()) == {1}


@pytest.mark.faults
def test_a_job_that_refuses_its_configuration_stops_the_search(make_search: MakeSearch) -> None:
    search = make_search("refused", trials=4, proxy__tasks="[SST-2, NoSuchTask]")
    output = search.finish(expect=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "NoSuchTask" in errors[0]
    assert "Traceback" not in output
    assert not (search.output_dir / "study.db").exists()

    blocked = make_search("blocked", trials=4)
    (blocked.output_dir / "leader.lock").mkdir(parents=True)
    output = blocked.finish(expect=2)
    assert "leader.lock: Is a directory; mend that, and the same command goes on" in output
    assert "Traceback" not in output


def test_nsga2_with_a_second_objective_and_tpe_reuse_known_results(make_search: MakeSearch, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    settings = {"trials": SPACE, "cohort": 13, "confirm_top": 0}
    everything = make_search("everything", sampler="exhaustive", storage=storage, **settings)
    everything.finish()
    for sampler, more in (("nsga2", {"second_objective": "deepest_layer"}), ("tpe", {}), ("random", {}), ("ga", {})):
        search = make_search(sampler, sampler=sampler, trials=12, confirm_top=0, storage=storage, **more)
        output = search.finish()
        found = [one for one in search.evaluations() if one.outcome != REPEATED]
        assert len({one.genome for one in found}) == len(found) == 12, sampler
        assert {one.seconds for one in found} == {0.0}, "known results were computed again"
        assert "REPORT.md" in output
    front = (tmp_path / "nsga2" / "report" / "REPORT.md").read_text()
    assert "deepest" in front


def test_halving_ends_the_worse_half_early_and_reports_how_well_that_went(make_search: MakeSearch) -> None:
    settings = {
        "trials": 16,
        "population": 5,
        "cohort": 5,
        "confirm_top": 0,
        "halving": 2,
        "proxy__report_at": "[2, 4]",
    }
    search = make_search("halved", **settings)
    search.finish()
    found = search.evaluations()
    assert len(found) == 16
    outcomes = {one.outcome for one in found if one.generation == 0}
    assert outcomes == {"ok"}, "the first job has nothing to be compared with"
    stopped = [one for one in found if one.outcome == "stopped early"]
    assert stopped, "none of eleven students was below the median"
    assert all(one.fitness is None and one.reports for one in stopped)
    assert {one.outcome for one in found} == {"ok", "stopped early"}
    report = (search.output_dir / "report" / "REPORT.md").read_text()
    assert "Spearman" in report
    assert f"{len(stopped)} stopped early" in report


@pytest.mark.faults
def test_a_search_whose_jobs_all_run_out_of_time_gives_up(make_search: MakeSearch) -> None:
    search = make_search("late", sampler="random", trials=8, cohort=2, job_minutes=0.03, max_failures=4)
    output = search.finish(expect=1)
    assert output.count("error: the last 4 genomes got no fitness, the last one: timeout") == 1, output
    assert not search.job_processes()
    assert [one.outcome for one in search.evaluations()] == ["timeout"] * 4
