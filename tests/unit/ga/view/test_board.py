"""TensorBoard's pages of a search, read back with TensorBoard itself."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ga.evolution.genome import Space
from ga.evolution.sampler import parameter_names
from ga.study.evaluations import REPEATED, RUNNING, Evaluation
from ga.view.board import SEARCH, TRIALS, SearchBoard

SPACE = Space(student_layers=2, teacher_layers=4)
START = datetime.datetime(2026, 1, 1)


def history() -> list[Evaluation]:
    """Two generations of three, one failure among them, and a third that has begun."""
    fitness = [0.5, 0.25, 0.75, None, 0.625, 0.5]
    found = [
        Evaluation(
            number,
            f"{number % 3}-{number // 2}",
            "ok" if value is not None else "diverged",
            fitness=value,
            generation=number // 3,
            scores={} if value is None else {"SST-2": value + 0.125},
            seconds=16.0,
            finished=START + datetime.timedelta(seconds=60 * number),
        )
        for number, value in enumerate(fitness)
    ]
    return [*found, Evaluation(6, "2-2", REPEATED, fitness=0.5), Evaluation(7, "1-4", RUNNING, generation=2, job="h:f")]


def board(folder: Path) -> SearchBoard:
    return SearchBoard(folder, SPACE, tasks=["SST-2"], say=print)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / SEARCH)).Reload()
    return {
        tag.removeprefix("search/"): [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


EXPECTED = {
    "best": [(1, 0.5), (2, 0.5), (3, 0.75), (4, 0.75), (5, 0.75), (6, 0.75)],
    "fitness": [(1, 0.5), (2, 0.25), (3, 0.75), (5, 0.625), (6, 0.5)],
    "mean": [(3, 0.5), (6, 0.5625)],
    "seconds_per_evaluation": [(step, 16.0) for step in range(1, 7)],
    "without_fitness": [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)],
    "jobs_running": [(6, 1)],
}


def test_the_curves_are_those_of_the_history(tmp_path: Path) -> None:
    opened = board(tmp_path)
    for _ in range(2):  # the second time nothing is new
        opened.refresh(history(), running_jobs=1, population=3)
    opened.close()
    found = curves(tmp_path)
    assert {tag: found[tag] for tag in EXPECTED} == EXPECTED
    assert [step for step, _ in found["diversity"]] == [3, 6]
    assert all(0 < value <= 1 for _, value in found["diversity"])


def test_a_second_driver_makes_the_same_curves_anew(tmp_path: Path) -> None:
    first = board(tmp_path)
    first.refresh(history()[:4], running_jobs=1, population=3)
    first.close()
    second = board(tmp_path)
    second.refresh(history(), running_jobs=1, population=3)
    second.close()
    found = curves(tmp_path)
    assert {tag: found[tag] for tag in EXPECTED} == EXPECTED


def test_evaluations_count_in_the_order_in_which_they_end(tmp_path: Path) -> None:
    opened = board(tmp_path)
    late_first = [replace(history()[0], outcome=RUNNING, fitness=None), *history()[1:3]]
    opened.refresh(late_first, running_jobs=1, population=3)
    opened.refresh(history()[:3], running_jobs=0, population=3)
    opened.close()
    found = curves(tmp_path)
    assert found["fitness"] == [(1, 0.25), (2, 0.75), (3, 0.5)]
    assert found["mean"] == [(3, 0.5)]
    assert found["jobs_running"] == [(2, 1), (3, 0)]


@pytest.mark.parametrize(
    ("changes", "genomes"),
    [({"separate_attention": True}, ("1-2", "1-2/3-4")), ({"kind": "both"}, ("1-2@1-2", "3-2@1-2"))],
)
def test_genomes_that_differ_behind_the_first_mapping_have_a_diversity(
    tmp_path: Path, changes: dict[str, Any], genomes: tuple[str, str]
) -> None:
    opened = SearchBoard(tmp_path, replace(SPACE, **changes), tasks=["SST-2"], say=print)
    two = [replace(one, genome=genome) for one, genome in zip(history(), genomes, strict=False)]
    opened.refresh(two, running_jobs=0, population=2)
    opened.close()
    assert 0 < curves(tmp_path)["diversity"][0][1] < 1


def test_the_first_generation_may_be_larger_than_the_population(tmp_path: Path) -> None:
    opened = board(tmp_path)
    for known in (history()[:2], history()[:3], history()):
        opened.refresh(known, running_jobs=0, population=2)
    opened.close()
    assert curves(tmp_path)["mean"] == [(3, 0.5), (6, 0.5625)]


def test_a_generation_with_a_repeated_proposal_has_a_point(tmp_path: Path) -> None:
    opened = board(tmp_path)
    opened.refresh([replace(history()[0], outcome=REPEATED), *history()[1:]], running_jobs=1, population=3)
    opened.close()
    assert curves(tmp_path)["mean"] == [(2, 0.5), (5, 0.5625)]


def test_the_last_generation_has_a_point_when_the_search_ends(tmp_path: Path) -> None:
    opened = board(tmp_path)
    opened.refresh(history()[:5], running_jobs=0, population=3)
    opened.close()
    assert curves(tmp_path)["mean"] == [(3, 0.5), (5, 0.625)]


def test_a_generation_that_was_interrupted_has_no_point(tmp_path: Path) -> None:
    opened = board(tmp_path)
    running = replace(history()[5], outcome=RUNNING, fitness=None, finished=None)
    opened.refresh([*history()[:5], running], running_jobs=1, population=3)
    opened.close()
    assert curves(tmp_path)["mean"] == [(3, 0.5)]


def test_without_generations_means_are_of_those_that_ended_one_after_another(tmp_path: Path) -> None:
    """TensorBoard drops points when steps go back."""
    last_first = [replace(one, generation=None) for one in history()[:6]]
    last_first[0] = replace(last_first[0], finished=START + datetime.timedelta(hours=1))
    opened = board(tmp_path)
    opened.refresh(last_first, running_jobs=0, population=3)
    opened.close()
    assert curves(tmp_path)["mean"] == [(3, 0.5), (6, 0.5416666865348816)]


def test_a_trial_that_failed_before_it_had_a_genome_counts(tmp_path: Path) -> None:
    opened = board(tmp_path)
    opened.refresh([*history()[:2], replace(history()[3], number=2, genome="")], running_jobs=0, population=3)
    opened.close()
    assert curves(tmp_path)["without_fitness"] == [(1, 0), (2, 0), (3, 1)]
    assert sorted(one.name for one in (tmp_path / TRIALS).iterdir()) == ["00000", "00001"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    opened = board(tmp_path)
    opened.refresh(history(), running_jobs=1, population=3)
    opened.close()
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path),
        "--port",
        str(port),
        "--host",
        "localhost",
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://localhost:{port}"
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def test_the_hparams_page_shows_genes_and_scores(server: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if len(ask(f"{server}/data/runs")) == 7:
                break
        except OSError:
            pass
        assert time.monotonic() < deadline, "TensorBoard has not read the files"
        time.sleep(0.2)
    experiment = ask(f"{server}/data/plugin/hparams/experiment", {})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"genome", *parameter_names(SPACE)}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == {"trial/fitness", "trial/SST-2"}
    query = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE"],
        "colParams": [{"hparam": name} for name in ("genome", *parameter_names(SPACE))],
    }
    groups = {
        group["name"]: group for group in ask(f"{server}/data/plugin/hparams/session_groups", query)["sessionGroups"]
    }
    assert set(groups) == {f"{number:05d}" for number in range(6)}
    third = groups["00002"]
    assert third["hparams"] == {"genome": "2-1", "layer_1": 2.0, "layer_2": 1.0}
    assert {value["name"]["tag"]: value["value"] for value in third["metricValues"]} == {
        "trial/fitness": 0.75,
        "trial/SST-2": 0.875,
    }
    assert groups["00003"]["sessions"][0]["status"] == "STATUS_FAILURE"
    assert TRIALS in third["sessions"][0]["name"]
