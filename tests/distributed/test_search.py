"""Whole searches: one with real jobs through the real launcher, all others with stand-ins that train nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from launching import ROOT, Run
from postgres import Cluster
from searching import YARDSTICK, SearchRun, finish, make_tiny_search, wait_until
from tiny_world import TinyWorld

from engine.records.records import read_records
from ga.jobs.launcher import LOG
from ga.study.evaluations import REPEATED
from ga.study.storage import open_storage

MakeSearch = Callable[..., SearchRun]
SPACE = 25
"""Genomes: 2 student layers, 4 teacher layers or none."""
GOLDEN = ROOT / "tests" / "golden" / "job_logs"
SLOWLY = {"seconds": 0.1}


@pytest.fixture(scope="module")
def real_search(tiny_world: TinyWorld, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchRun, str]:
    """Two jobs through the real launcher, and what their driver said."""
    folder = tmp_path_factory.mktemp("searched") / "real"
    settings = {
        "trials": 4, "population": 2, "cohort": 2, "confirm_top": 0, "proxy__report_at": "[2]",
        "proxy__layer_table": True,
    }  # fmt: skip
    search = make_tiny_search(folder, tiny_world, glue, **settings)
    return search, search.finish()


@pytest.mark.launcher
def test_a_real_search_ends_with_a_report_and_is_over(real_search: tuple[SearchRun, str]) -> None:
    search, output = real_search
    found = search.evaluations()
    assert len({one.genome for one in found}) == len(found) == 4
    assert all(one.outcome == "ok" and one.by_seed == {0: one.fitness} for one in found), found
    assert set(search.results().values()) == {1}
    for text in ("generation 0", "best ", "4 of 4", "REPORT.md"):
        assert text in output, output
    assert {"REPORT.md", "leaderboard.csv"} <= {path.name for path in (search.output_dir / "report").iterdir()}
    assert list((search.output_dir / "tensorboard").rglob("events.out.tfevents.*"))

    folders = search.folders()
    assert len(folders) == 2
    assert "4 done already" in search.finish()
    assert search.folders() == folders, "finished trials were run again"


def test_kept_layers_are_searched_with_the_mapping(make_stand_in_search: MakeSearch) -> None:
    settings = {"population": 4, "cohort": 4, "prerank": 3, "confirm_top": 1, "confirm_seeds": 2}
    search = make_stand_in_search("kept", space="both", trials=16, **settings)
    said = search.finish_here()
    assert "separate genes for kept layers: 625 genomes" in said
    assert "the best of 3 times as many offspring by the effects model" in said
    genomes = [one.genome for one in search.evaluations() if one.counts]
    assert {"2-4@2-4", "3-4@3-4", "2-4@0-0"} <= set(genomes)
    assert len(set(genomes)) == 16
    report = search.output_dir / "report"
    assert " (start)" in (report / "REPORT.md").read_text().partition("## Which student layer matters")[2]
    best = yaml.safe_load((report / "best.yaml").read_text())
    assert f"{best['student']['init']}@{best['mapping']['hidden']}" in genomes
    assert "16 done already" in search.finish_here()
    refusal = make_stand_in_search("kept", space="layers", trials=16, **settings).finish_here(expect=2)
    assert "search.space='layers', but it was begun with 'both'" in refusal


def test_a_distillation_with_the_winner(real_search: tuple[SearchRun, str], tmp_path: Path) -> None:
    search, _ = real_search
    best = search.output_dir / "report" / "best.yaml"
    assert yaml.safe_load(best.read_text())["mapping"]["hidden"] in {one.genome for one in search.evaluations()}
    steps = ["--train.steps", "2", "--train.warmup_steps", "1", "--train.global_batch", "4"]
    run = Run(tmp_path / "distilled", argv=["--config", str(best), *steps], launcher="none")
    run.finish()
    assert (run.run_dir.student / "model.safetensors").is_file()


def test_a_stand_in_writes_what_a_real_job_writes(real_search: tuple[SearchRun, str], tmp_path: Path) -> None:
    """The same records in the same order, with the same fields and types; of students that end early, those of real
    jobs in tests/golden."""
    real = real_search[0].folders()[0]
    stand_in = run_stand_in(tmp_path / "same", real)
    for name in (LOG, "records.jsonl"):
        wanted = [(identity(record), shape(record)) for record in read_records(real / name)]
        assert [(identity(record), shape(record)) for record in read_records(stand_in / name)] == wanted
    assert {record["kind"] for record in read_records(real / "records.jsonl")} == {"run", "step", "result"}

    first = read_records(real / LOG)[0]["genomes"][0]
    for status, case, settings, told in (
        ("stopped", "one_stopped_early", {"stop_below": {2: 2.0}}, {}),
        ("diverged", "one_diverged", {}, {"genomes": {first: "diverges"}}),
    ):
        (wanted,) = [r for r in read_records(GOLDEN / case / LOG) if r.get("status") == status]
        for record in read_records(run_stand_in(tmp_path / status, real, settings, told) / LOG):
            if record.get("status") == status:
                assert {key: type(value) for key, value in record.items()} == {k: type(v) for k, v in wanted.items()}
                break
        else:
            pytest.fail(f"nothing {status}")


def run_stand_in(
    folder: Path, real: Path, proxy: dict[str, Any] | None = None, told: dict[str, object] | None = None
) -> Path:
    """The job of another folder, but for `proxy`."""
    folder.mkdir()
    config = yaml.safe_load((real / "config.yaml").read_text())
    config |= {"output_dir": str(folder), "proxy": config["proxy"] | (proxy or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "tests/support/stand_in_proxy.py", "--config", str(folder / "config.yaml")]
    env = os.environ | {"STAND_IN": json.dumps(told or {})}
    with (folder / LOG).open("w") as log:
        subprocess.run(words, cwd=ROOT, env=env, stdout=log, check=True, timeout=60)
    return folder


def identity(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("kind", "status", "genome", "seed", "step", "genomes", "seeds")}


def shape(value: object) -> object:
    """Keys and types."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


def test_a_search_from_dry_run_to_confirmation(make_stand_in_search: MakeSearch) -> None:
    search = make_stand_in_search("whole", trials=8, population=4, cohort=4, confirm_top=1, confirm_seeds=2)
    rehearsed = search.finish_here("--dry_run")
    assert "25 genomes" in rehearsed
    assert "s for a job of 4: 2-4 3-4 1-2 4-4 (" in rehearsed
    assert "s per evaluation; 4 on 1 slot take" in rehearsed
    assert [folder.name for folder in search.folders()] == ["00000"]
    again = search.finish_here("--dry_run")
    assert "running the first job" not in again
    assert rehearsed.splitlines()[-2:] == again.splitlines()[-2:]
    assert not (search.output_dir / "tensorboard").exists()
    output = search.finish_here()
    found = search.evaluations()
    assert len({one.genome for one in found}) == len(found) == 8
    assert all(one.outcome == "ok" and one.by_seed == {0: one.fitness} for one in found), found
    assert {one.generation for one in found} == {0, 1, 2} or {one.generation for one in found} == {0, 1}
    assert set(search.results().values()) == {1}, "what --dry_run has evaluated was run again"
    assert len(search.results()) == 8
    for text in ("4 done already", "generation 1", "best ", "8 of 8", "confirmation: ", "REPORT.md"):
        assert text in output, output
    assert {path.name for path in (search.output_dir / "confirmations").iterdir()} == {"00000", "00002"}
    report = (search.output_dir / "report" / "REPORT.md").read_text()
    assert "| emb | 2-4 (uniform) | 1.00\\* | .50 |" in report, "the confirmation's jobs make layer tables"
    assert "0 of" not in report.partition("## Which layers know what")[2].partition("|")[0]
    assert "8 of 8 done" in search.finish_here("--status")

    folders = search.folders()
    search.finish_here()
    assert search.folders() == folders, "finished trials were run again"

    changed = search.finish_here("--proxy.steps", "5", expect=2)
    assert changed.count("error: ") == 1
    assert "fingerprint" in changed
    assert ": proxy)" in changed


def test_what_goes_wrong_in_jobs_costs_the_genomes_that_it_concerns(make_stand_in_search: MakeSearch) -> None:
    told = {"fits": 1, "genomes": {"1-2": "diverges", "3-4": "crashes"}}
    search = make_stand_in_search("wrong", trials=5, population=5, cohort=5, confirm_top=0, told=told)
    output = search.finish_here()
    assert "out of memory with 5 students side by side; going on with 2" in output
    assert "out of memory with 2 students side by side; going on with 1" in output
    found = {one.genome: one for one in search.evaluations()}
    assert len(found) == 5
    assert {genome: one.outcome for genome, one in found.items() if one.outcome != "ok"} == {
        "1-2": "diverged",
        "3-4": "lost",
    }
    assert "told to crash at 3-4" in found["3-4"].message
    assert search.results().total() == 3
    assert len([folder for folder in search.folders() if "3-4" in (folder / "config.yaml").read_text()]) >= 2
    report = (search.output_dir / "report" / "REPORT.md").read_text()
    assert "diverged" in report


def test_two_drivers_share_a_search_on_sqlite(make_stand_in_search: MakeSearch) -> None:
    share_a_search(
        make_stand_in_search("shared", sampler="exhaustive", trials=SPACE, cohort=7, confirm_top=0, told=SLOWLY), SPACE
    )


def test_two_drivers_share_a_search_on_postgresql(make_stand_in_search: MakeSearch, postgres: Cluster) -> None:
    storage = postgres.url("searches")
    settings = {"trials": 12, "cohort": 3, "confirm_top": 1, "confirm_seeds": 2}
    share_a_search(make_stand_in_search("shared", sampler="random", storage=storage, told=SLOWLY, **settings), 12)


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


def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(make_stand_in_search: MakeSearch) -> None:
    settings = {"sampler": "random", "trials": 4, "cohort": 2, "local_slots": 2, "confirm_top": 0}
    search = make_stand_in_search("stopped", told={"seconds": 600}, **settings)
    driver = search.start()
    wait_until(lambda: len(list(search.output_dir.glob("trials/*/output.log"))) == 2, driver)  # side by side
    driver.send_signal(signal.SIGINT)
    output = finish(driver, expect=4)
    assert "the same command continues" in output
    assert not search.job_processes()
    search.told = {}
    search.finish()
    assert {one.outcome for one in search.evaluations()} == {"ok"}
    assert set(search.results().values()) == {1}


@pytest.mark.faults
def test_a_job_that_refuses_its_configuration_stops_the_search(make_stand_in_search: MakeSearch) -> None:
    search = make_stand_in_search("refused", trials=4, told={"refuses": "proxy.tasks='NoSuchTask'"})
    output = search.finish_here(expect=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "NoSuchTask" in errors[0]
    assert "Traceback" not in output
    search.told = {}
    search.argv += ["--proxy.steps", "5", "--search.trials", "2", "--search.confirm_top", "0"]
    search.finish_here()
    assert len(search.evaluations()) == 2, "what a job refuses can be corrected"

    blocked = make_stand_in_search("blocked", trials=4)
    (blocked.output_dir / "leader.lock").mkdir(parents=True)
    output = blocked.finish_here(expect=2)
    assert "leader.lock: Is a directory; fix that, and the same command continues" in output
    assert "Traceback" not in output


def test_all_samplers_reuse_known_results(make_stand_in_search: MakeSearch, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    settings = {"trials": SPACE, "cohort": 13, "confirm_top": 0}
    everything = make_stand_in_search("everything", sampler="exhaustive", storage=storage, **settings)
    everything.finish_here()
    for sampler, more in (("nsga2", {"second_objective": "deepest_layer"}), ("tpe", {}), ("random", {}), ("ga", {})):
        search = make_stand_in_search(sampler, sampler=sampler, trials=8, confirm_top=0, storage=storage, **more)
        output = search.finish_here()
        found = [one for one in search.evaluations() if one.outcome != REPEATED]
        assert len({one.genome for one in found}) == len(found) == 8, sampler
        assert {one.seconds for one in found} == {0.0}, "known results were computed again"
        assert "REPORT.md" in output
    front = (tmp_path / "nsga2" / "report" / "REPORT.md").read_text()
    assert "deepest" in front


def test_a_search_measures_its_yardstick_first_and_once(make_stand_in_search: MakeSearch, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'both.db'}"
    settings = {
        "population": 5,
        "cohort": 5,
        "storage": storage,
        "proxy__yardstick": "{}",
        "proxy__other_tasks": "[RTE]",
    }
    search = make_stand_in_search("first", trials=8, confirm_top=1, confirm_seeds=2, **settings)
    output = search.finish_here()
    assert "yardstick: 2-4 3-4 1-2 4-4 0-0 with seeds 0, 1" in output
    assert "confirmation: " in output
    assert " with seeds 2, 3" in output, "seeds that neither search nor yardstick has seen"
    yardstick = sorted((search.output_dir / "yardstick").iterdir())
    assert len(yardstick) == 2, "a job for each seed"
    measured = [r for folder in yardstick for r in read_records(folder / "records.jsonl") if r["kind"] == "result"]
    assert {r["yardstick"]["SST-2"]["start"] for r in measured} == {0.4}
    (kept,) = attributes(search, "yardstick")
    assert {task: scale["start"] for task, scale in kept["scales"].items()} == {"SST-2": 0.4, "MRPC": 0.4, "STS-B": 0.4}
    assert {task: scale["weight"] for task, scale in kept["scales"].items()} == {
        task: noise["reliability"] for task, noise in kept["noise"].items()
    }
    assert all(0.9 < noise["reliability"] < 1 and 0 < noise["deviation"] < 0.02 for noise in kept["noise"].values())

    found = {one.genome: one for one in search.evaluations() if one.outcome != REPEATED}
    assert len(found) == 8
    heuristics = {"2-4", "3-4", "1-2", "4-4", "0-0"}
    assert {genome for genome, one in found.items() if one.seconds == 0.0} == heuristics, "not evaluated again"
    weights = {task: scale["weight"] for task, scale in kept["scales"].items()}
    for one in found.values():
        shares = {task: (score - 0.4) / 0.55 for task, score in one.scores.items()}
        total = sum(weights[task] * shares[task] for task in weights) / sum(weights.values())
        assert one.fitness == pytest.approx(total)
        assert set(one.scores) == {"SST-2", "MRPC", "STS-B"}, "other tasks are scored in the confirmation alone"
    report = (search.output_dir / "report" / "REPORT.md").read_text()
    assert "| SST-2 | 0.4000 |" in report
    assert "| RTE | no |" in report or "uniform itself won" in report

    folders = search.folders()
    assert "measuring" not in search.finish_here(), "it is kept"
    assert search.folders() == folders
    other = make_stand_in_search("second", trials=5, confirm_top=0, **settings)
    assert "measuring" not in other.finish_here()
    assert attributes(other, "yardstick") == [kept]
    assert not (other.output_dir / "yardstick").exists()


def test_a_search_goes_on_with_the_yardstick_that_it_was_begun_with(make_stand_in_search: MakeSearch) -> None:
    search = make_stand_in_search("given", trials=5, confirm_top=0)
    search.finish_here()
    for other in ("{}", YARDSTICK.replace("0.95", "0.9")):
        output = search.finish_here("--proxy.yardstick", other, expect=2)
        assert "cannot be continued: proxy.yardstick.SST-2." in output, other
    search.finish_here()


def test_a_dry_run_evaluates_the_first_job_of_the_yardstick(make_stand_in_search: MakeSearch) -> None:
    settings = {"trials": 5, "cohort": 3, "confirm_top": 0, "proxy__yardstick": "{}"}
    search = make_stand_in_search("measured", **settings)
    for _ in range(2):  # the second time it runs nothing
        output = search.finish_here("--dry_run")
        assert "s for a job of 3: 2-4 3-4 1-2 (" in output
        assert "5 on 1 slot take" in output
        assert [folder.name for folder in (search.output_dir / "yardstick").iterdir()] == ["00000"]
    assert not (search.output_dir / "trials").exists()
    output = search.finish_here("--search.population", "7")  # the dry run has begun no search
    assert "5 of 5" in output
    assert len(list((search.output_dir / "yardstick").iterdir())) == 4, "the first of four jobs was run again"


@pytest.mark.faults
def test_a_dry_run_whose_job_fails_says_where_to_look(make_stand_in_search: MakeSearch) -> None:
    told = {"genomes": {"2-4": "crashes"}}
    search = make_stand_in_search("crashes", trials=5, cohort=1, told=told)
    output = search.finish_here("--dry_run", expect=2)
    assert "told to crash at 2-4" in output
    assert f"error: the first job gave no fitness: see {search.output_dir}/*/*/output.log" in output
    search.told = {}
    assert "s for a job of 1: 2-4 (" in search.finish_here("--dry_run")


@pytest.mark.faults
def test_a_search_without_any_heuristic_that_runs_gives_up(make_stand_in_search: MakeSearch) -> None:
    told = {"genomes": dict.fromkeys(("2-4", "3-4", "1-2", "4-4", "0-0"), "diverges")}
    search = make_stand_in_search("nothing", trials=5, proxy__yardstick="{}", told=told)
    output = search.finish_here(expect=1)
    assert "error: none of 2-4, 3-4, 1-2, 4-4, 0-0 got a score: see " in output


def attributes(search: SearchRun, key: str) -> list[Any]:
    """The values of this user attribute in the search's own study."""
    storage = open_storage(search.storage or f"sqlite:///{search.output_dir / 'study.db'}")
    try:
        study = optuna.load_study(storage=storage.optuna, study_name=search.output_dir.name)
        return [study.user_attrs[key]] if key in study.user_attrs else []
    finally:
        storage.close()


def test_halving_ends_the_worse_half_early_and_reports_how_well_that_went(make_stand_in_search: MakeSearch) -> None:
    settings = {
        "trials": 16,
        "population": 5,
        "cohort": 5,
        "confirm_top": 0,
        "halving": 2,
        "proxy__report_at": "[2, 4]",
    }
    search = make_stand_in_search("halved", **settings)
    search.finish_here()
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
def test_a_search_whose_jobs_all_run_out_of_time_gives_up(make_stand_in_search: MakeSearch) -> None:
    settings = {"sampler": "random", "trials": 8, "cohort": 2, "job_minutes": 0.03, "max_failures": 4}
    search = make_stand_in_search("late", told={"seconds": 600}, **settings)
    output = search.finish(expect=1)
    assert output.count("error: the last 4 genomes got no fitness, the last one: timeout") == 1, output
    assert not search.job_processes()
    assert [one.outcome for one in search.evaluations()] == ["timeout"] * 4
