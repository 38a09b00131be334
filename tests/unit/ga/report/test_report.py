"""The report of a search: its statistics against scipy, its tables, its sentences, its pictures."""

from __future__ import annotations

import csv
import datetime
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from engine.config.distill import LossConfig
from engine.records.yardstick import Noise, TaskScale, fitness_of
from ga.evolution.genome import Space
from ga.report.confirmation import compare, seed_deviation, verdict, winner
from ga.report.drawing import LABEL_GAP, label_lines, limits, new_figure, spread
from ga.report.facts import Facts
from ga.report.layers import known_layers
from ga.report.text import report_text
from ga.report.write import write_report
from ga.study.evaluations import REPEATED, RUNNING, STOPPED_EARLY, Evaluation, rank_evaluations
from ga.study.yardstick import Measured

UNIFORM = "2-4-6"
TASKS = ("SST-2", "STS-B")
YARDSTICK = Measured(
    scales={
        "SST-2": TaskScale(start=0.55, teacher=0.95, weight=0.9),
        "STS-B": TaskScale(start=0.35, teacher=0.9, weight=0.6),
        "MRPC": TaskScale(start=0.75, teacher=0.76, weight=0.0),
    },
    noise={task: Noise(deviation, 0.8) for task, deviation in (("SST-2", 0.01), ("STS-B", 0.02), ("MRPC", 0.03))},
    none={"SST-2": 0.6, "STS-B": 0.4, "MRPC": 0.7},
    seconds=120.0,
)


def scored(number: int, genome: str, fitness: float, **more) -> Evaluation:
    scores = {"SST-2": fitness + 0.1, "STS-B": fitness - 0.1, "MRPC": 0.77}
    more = {"by_seed": {0: fitness}, "seconds": 20.0 + number, "cohort": 8, "job": "here:trials/0", **more}
    return Evaluation(number, genome, "ok", fitness=fitness, scores=scores, **more)


def facts(space: Space | None = None, **changes) -> Facts:
    space = space or Space(student_layers=3, teacher_layers=6)
    return replace(
        Facts(
            study="minilm-3",
            space=space,
            sampler="ga",
            search_seed=0,
            trials=60,
            population=20,
            cohort=8,
            fingerprint="3f9a0c11",
            teacher="models/all_minilm (6 layers)",
            student="a student of 3 layers (init uniform)",
            tasks=TASKS,
            yardstick=YARDSTICK,
            evaluator="probe",
            proxy="60 steps x 32 sequences of 128 tokens of data/a|b",
            seeds=(0,),
            heuristics={name: space.text(genes) for name, genes in space.heuristics().items()},
            command="python launch/search.py --config a.yaml",
            second_objective=None,
            versions={"mapdistill": "1.0", "torch": "2.13"},
            written=datetime.datetime(2026, 11, 30, 21, 0),
        ),
        **changes,
    )


def history(space: Space, count: int, *, generations: bool = True) -> list[Evaluation]:
    rng = np.random.default_rng(5)
    genomes = dict.fromkeys([*space.heuristics().values(), *(space.random(rng) for _ in range(3 * count))])
    found = []
    for number, genes in enumerate(list(genomes)[:count]):
        fitness = 0.7 - 0.01 * abs(sum(genes) / len(genes) - 3) + float(rng.normal(0, 0.003)) - 0.2 * (not any(genes))
        generation = number // 20 if generations else None
        reports = {20: fitness - 0.1 + float(rng.normal(0, 0.005)), 40: fitness - 0.03}
        found.append(scored(number, space.text(genes), fitness, generation=generation, reports=reports))
    return found


def rows_of(text: str, first_column: str) -> list[dict[str, str]]:
    """The rows of the table whose header begins with `first_column`, by column name."""
    block = next(part for part in text.split("\n\n") if part.startswith(f"| {first_column} "))
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


CONFIRMED = {
    "0-3-5": {1: 0.71, 2: 0.735, 3: 0.70, 4: 0.727},
    UNIFORM: {1: 0.70, 2: 0.72, 3: 0.695, 4: 0.715},
    "1-3-6": {1: 0.699, 2: 0.73, 3: 0.69, 4: 0.72},
}


SCORES = {
    "RTE": {"0-3-5": {1: 0.5, 2: 0.51}, UNIFORM: {1: 0.52, 2: 0.53}},
    "SST-2": {genome: {seed: value + 0.1 for seed, value in by_seed.items()} for genome, by_seed in CONFIRMED.items()},
}


def test_intervals_are_those_of_scipy_at_bonferronis_level() -> None:
    found = compare(CONFIRMED, UNIFORM)
    assert [one.genome for one in found] == ["0-3-5", "1-3-6"]
    for one in found:
        a, b = list(CONFIRMED[one.genome].values()), list(CONFIRMED[UNIFORM].values())
        want = stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / 2)
        assert (one.low, one.high) == (pytest.approx(want.low, abs=1e-12), pytest.approx(want.high, abs=1e-12))
        assert one.mean == pytest.approx(np.mean(a) - np.mean(b))
        assert one.n == 4
    assert not found[1].is_clear


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_one_genome_is_compared_at_95_percent(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    (one,) = compare({"1-1-1": dict(enumerate(a)), UNIFORM: dict(enumerate(b))}, UNIFORM)
    differences = np.subtract(a, b)
    if differences.std() < 1e-9:
        assert one.high - one.low < 1e-6
        return
    want = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert one.low == pytest.approx(want.low, abs=1e-9, rel=1e-6)
    assert one.high == pytest.approx(want.high, abs=1e-9, rel=1e-6)
    assert one.is_clear == (not want.low <= 0 <= want.high)


def test_only_shared_seeds_count_and_one_gives_no_interval() -> None:
    found = compare({"a": {1: 0.5, 9: 0.9}, "b": {7: 0.9}, "u": {1: 0.4, 2: 0.1}, "c": {}}, "u")
    assert [(one.genome, one.n) for one in found] == [("a", 1), ("b", 0)]
    assert found[0].mean == pytest.approx(0.1)
    assert found[1].mean is None
    assert all(one.low is None and one.high is None and not one.is_clear for one in found)


def test_equal_differences_give_an_interval_of_width_zero() -> None:
    up, same = compare({"a": {1: 0.5, 2: 0.7}, "u": {1: 0.4, 2: 0.6}, "same": {1: 0.4, 2: 0.6}}, "u")
    assert up.low == up.high == pytest.approx(0.1)
    assert up.is_clear
    assert (same.low, same.high, same.is_clear) == (0.0, 0.0, False)


def test_failing_a_seed_does_not_help_to_win() -> None:
    assert winner(CONFIRMED) == "0-3-5"
    assert winner({"lucky": {1: 0.99}, "whole": {1: 0.5, 2: 0.5}}) == "whole"
    assert winner({"lost": {}, "b": {1: 0.5}, "c": {2: 0.6}}) == "c"


def test_seed_deviation_is_pooled() -> None:
    table = {"a": {1: 0.1, 2: 0.3}, "b": {1: 0.5, 2: 0.6, 3: 0.7}, "c": {1: 0.0}}
    assert seed_deviation(table) == pytest.approx(math.sqrt((0.02 + 0.02) / (1 + 2)))
    assert seed_deviation({"a": {1: 0.1}}) is None


@pytest.mark.parametrize(
    ("confirmed", "want"),
    [
        (
            {"0-3-5": {1: 0.71, 2: 0.732, 3: 0.705}, UNIFORM: {1: 0.70, 2: 0.72, 3: 0.695}},
            "0-3-5 closes 0.0107 ± 0.0029 more of the gap than uniform (2-4-6) (95 % interval, 3 new seeds).",
        ),
        (
            {"0-3-5": {1: 0.75, 2: 0.70}, UNIFORM: {1: 0.70, 2: 0.72}},
            "No difference from uniform (2-4-6) was found: the winner, 0-3-5, closes 0.02 ± 0.44 more of the gap (95 % "
            "interval, 2 new seeds), within noise; use uniform or confirm with more seeds.",
        ),
        (
            {"0-3-5": {1: 0.6, 2: 0.701}, UNIFORM: {1: 0.7, 2: 0.8}},
            "uniform (2-4-6) itself won: the next best, 0-3-5, closes 0.0995 ± 0.0064 less of the gap (95 % interval, "
            "2 new seeds). The search has found nothing better.",
        ),
        (
            {"0-3-5": {1: 0.6, 2: 0.9}, UNIFORM: {1: 0.7, 2: 0.9}},
            "uniform (2-4-6) itself won: the next best, 0-3-5, closes 0.05 ± 0.64 less of the gap (95 % interval, 2 "
            "new seeds), within noise. The search has found nothing better.",
        ),
        ({UNIFORM: {1: 0.7}}, "uniform (2-4-6) itself won: no other genome has a fitness with the new seeds."),
        (
            {"0-3-5": {1: 0.60, 2: 0.70, 3: 0.9}, UNIFORM: {1: 0.70, 2: 0.80}},
            "0-3-5 closes 0.1000 ± 0.0000 less of the gap than uniform (2-4-6) (95 % interval, 2 new seeds); use "
            "uniform.",
        ),
        (
            {"0-3-5": {1: 0.8, 2: 0.8}, UNIFORM: {1: 0.7}},
            "0-3-5 closes 0.1000 more of the gap than uniform (2-4-6), but with the one new seed that both have, and "
            "one seed shows no noise: no evidence that the winner is better than uniform; confirm with more seeds.",
        ),
        (
            {"0-3-5": {1: 0.8}},
            "0-3-5 has the best mean over the new seeds, but uniform (2-4-6) has no fitness with any of them: no "
            "evidence that the winner is better than uniform.",
        ),
    ],
)
def test_the_sentence_says_what_the_interval_allows(confirmed: dict[str, dict[int, float]], want: str) -> None:
    assert verdict(confirmed, UNIFORM) == want


EVALUATIONS = [
    scored(0, UNIFORM, 0.70),
    scored(1, "4-5-6", 0.68),
    Evaluation(
        2, "6-6-6", "diverged", job="here:trials/00002", message="RuntimeError: a | b\nnot *finite*", seconds=5.0
    ),
    scored(3, "0-3-5", 0.72),
    Evaluation(4, "0-3-5", REPEATED, fitness=0.72),
    Evaluation(5, "1-1-1", STOPPED_EARLY, reports={20: 0.5}, seconds=9.0),
    Evaluation(6, "1-1-2", RUNNING),
    scored(7, "0-0-0", 0.50),
]


def test_the_tables_hold_the_numbers(tmp_path: Path) -> None:
    others = {"random | x": [scored(0, UNIFORM, 0.69), scored(1, "1-2-4", 0.71)]}
    report = write_report(tmp_path / "report", facts(), EVALUATIONS, others, CONFIRMED, SCORES, best_yaml="seed: 0\n")
    text = report.read_text(encoding="utf-8")
    assert (tmp_path / "report" / "best.yaml").read_text() == "seed: 0\n"
    assert text.split("\n\n")[1] == f"**{verdict(CONFIRMED, UNIFORM)}**"
    assert text.split("\n\n")[2].endswith("(seed_noise.png)")
    assert text.count("(seed_noise.png)") == 1
    assert "(6 layers) to a student of 3 layers (init uniform): 6 evaluations of 343 genomes, 30 November" in text
    best = rows_of(text, "place")
    assert [row["genome"] for row in best] == ["0-3-5", UNIFORM, "4-5-6", "0-0-0", "1-2-3", "6-6-6"]
    assert [row["heuristic"] for row in best] == ["", "uniform", "last", "none", "first", "all-last"]
    assert [row["fitness"] for row in best] == ["0.7200", "0.7000", "0.6800", "0.5000", "not evaluated", "diverged"]
    assert [row["minus uniform"] for row in best] == ["0.0200", "0.0000", "-0.0200", "-0.2000", "", ""]
    assert (best[0]["SST-2"], best[0]["STS-B"], best[0]["trial"]) == ("0.8200", "0.6200", "3")
    confirmed = rows_of(text, "genome")
    assert [row["genome"] for row in confirmed] == ["0-3-5", "1-3-6", UNIFORM]
    low, high = stats.ttest_rel(*(list(CONFIRMED[g].values()) for g in ("0-3-5", UNIFORM))).confidence_interval(0.975)
    assert confirmed[0]["95 % interval"] == f"{low:.4f} to {high:.4f}"
    assert confirmed[0]["± std over seeds"] == f"± {np.std(list(CONFIRMED['0-3-5'].values()), ddof=1):.4f}"
    assert (confirmed[0]["mean"], confirmed[0]["minus uniform"]) == ("0.7180", "0.0105")
    assert rows_of(text, "search")[1] == {
        "search": "random \\| x",
        "evaluations": "2",
        "best of its first 6": "0.7100",
        "best of all": "0.7100",
        "genome": "1-2-4",
    }
    (failed,) = rows_of(text, "trial")
    assert (failed["trial"], failed["message"]) == ("2", r"RuntimeError: a \| b not \*finite\*")
    assert "6 done, 1 still running" in text
    assert "1 diverged, 1 stopped early" in text
    assert "median 20.5 s, total 105 s" in text  # of 20, 21, 5, 23, 9 and 27 s
    noise = math.sqrt(np.mean([np.var(list(by_seed.values()), ddof=1) for by_seed in CONFIRMED.values()]))
    assert f"Between seeds of one genome: {noise:.4f}, pooled over 3 genomes of the confirmation" in text
    spread_of = np.std([0.70, 0.68, 0.72, 0.50], ddof=1)
    assert f"between the 4 genomes: {spread_of:.4f}." in text
    assert f"deepspeed launch/distill.py --config {tmp_path / 'report' / 'best.yaml'}\n" in text
    assert {"python launch/search.py --config a.yaml", "`3f9a0c11`"} <= set(re.findall(r"python .*|`3f\w+`", text))


def test_the_report_says_when_where_and_with_what_it_was_made(tmp_path: Path) -> None:
    begun = [replace(EVALUATIONS[0], began=datetime.datetime(2026, 11, 30, 20, 30)), *EVALUATIONS[1:]]
    text = report_text(facts(), begun, {}, {}, {}, [], best_yaml=tmp_path / "b")
    assert "| date | 2026-11-30 20:30 to 2026-11-30 21:00, 30 min 00 s with confirmation and pauses |" in text
    assert "| hosts of the jobs | here |" in text
    assert "| versions | mapdistill 1.0, torch 2.13 |" in text


def test_an_axis_grows_for_teacher_and_untrained_student_where_they_are_near() -> None:
    values = np.array([0.6, 0.7, 0.75, 0.8])
    assert limits(values, [0.0, 1.0]) == pytest.approx((0.6 - 0.02, 1.0 + 0.02))
    assert limits(values) == pytest.approx((0.6 - 0.01, 0.8 + 0.01))


def test_what_an_axis_does_not_reach_is_named_at_its_end(tmp_path: Path) -> None:
    _, (axes,) = new_figure(1, width=4, height=3)
    axes.set_ylim(0.2, 0.6)
    label_lines(axes, {"untrained": 0.0, "uniform": 0.5, "teacher": 1.0}, strong=["untrained", "teacher"])
    assert [text.get_text() for text in axes.texts] == [
        "untrained 0.0000 (below)",
        "uniform 0.5000",
        "teacher 1.0000 (above)",
    ]


def test_tasks_that_were_not_searched_on_are_apart(tmp_path: Path) -> None:
    text = write_report(tmp_path / "report", facts(), EVALUATIONS, {}, CONFIRMED, SCORES).read_text(encoding="utf-8")
    searched, other = rows_of(text, "task")
    assert (searched["task"], searched["searched on"], searched["difference"]) == ("SST-2", "yes", "0.0105")
    assert (other["task"], other["searched on"], other["0-3-5"]) == ("RTE", "no", "0.5050")
    low, high = stats.ttest_rel(*(list(CONFIRMED[g].values()) for g in ("0-3-5", UNIFORM))).confidence_interval(0.95)
    assert searched["95 % interval"] == f"{low:.4f} to {high:.4f}"
    assert "itself won" in report_text(facts(), EVALUATIONS, {}, {UNIFORM: {1: 0.7}}, {}, [], best_yaml=tmp_path / "b")


def test_the_report_says_what_fitness_is_measured_by(tmp_path: Path) -> None:
    text = report_text(facts(), EVALUATIONS, {}, {}, {}, [], best_yaml=tmp_path / "b")
    rows = {row["scored on"]: row for row in rows_of(text, "scored on")}
    assert rows["SST-2"] == {
        "scored on": "SST-2", "untrained": "0.5500", "none": "0.6000", "teacher": "0.9500", "gap": "0.4000",
        "deviation between seeds": "0.0100", "reliability": "0.80", "weight": "0.60",
    }  # fmt: skip
    assert rows["MRPC"]["weight"] == "does not count"


@pytest.mark.parametrize(
    ("better", "want"),
    [
        ({"none": {"SST-2": 0.9, "STS-B": 0.4}}, "SST-2: no mapping beats none (0.9000); the best, 0-3-5, has 0.8200"),
        ({"start": 0.7}, "STS-B: no mapping beats the untrained student (0.7000); the best, 0-3-5, has 0.6200"),
    ],
)
def test_a_ranking_that_no_training_beats_is_not_called_a_result(tmp_path: Path, better: dict, want: str) -> None:
    none = {**YARDSTICK.none, **better.get("none", {})}
    scales = dict(YARDSTICK.scales)
    if "start" in better:
        scales["STS-B"] = replace(scales["STS-B"], start=better["start"])
    about = facts(yardstick=replace(YARDSTICK, none=none, scales=scales))
    text = report_text(about, EVALUATIONS, {}, CONFIRMED, {}, [], best_yaml=tmp_path / "b")
    assert text.split("\n\n")[1] == f"**{verdict(CONFIRMED, UNIFORM)} Not a result for {want}.**"


def test_where_no_mapping_helps_on_any_task_there_is_no_result(tmp_path: Path) -> None:
    """Also with a clear winner: the ranking is one of damage."""
    scales = {
        task: replace(scale, start=max(scale.start, 0.83), teacher=max(scale.teacher, 0.95))
        for task, scale in YARDSTICK.scales.items()
    }
    about = facts(yardstick=replace(YARDSTICK, scales=scales))
    sentence = report_text(about, EVALUATIONS, {}, CONFIRMED, {}, [], best_yaml=tmp_path / "b").split("\n\n")[1]
    assert sentence.startswith(
        "**No result: on no task that counts does a mapping help (SST-2: no mapping beats the untrained student "
        "(0.8300); the best, 0-3-5, has 0.8200; STS-B: no"
    )
    assert "only orders the damage" in sentence
    assert "closes" not in sentence


def test_a_fitness_without_any_task_that_counts_is_not_called_a_result(tmp_path: Path) -> None:
    scales = {task: replace(scale, weight=0.0) for task, scale in YARDSTICK.scales.items()}
    text = report_text(
        facts(yardstick=replace(YARDSTICK, scales=scales)), EVALUATIONS, {}, {}, {}, [], best_yaml=tmp_path / "b"
    )
    assert text.split("\n\n")[1].startswith("**No result: fitness is the mean of the raw scores, which says little")


def test_layers_of_the_winner_stand_beside_those_of_uniform(tmp_path: Path) -> None:
    """As means over the seeds of the confirmation, with the marks of what the losses compared."""

    def confirmed(genome: str, seed: int, share: float) -> Evaluation:
        return scored(seed, genome, 0.7, layers={seed: [[share + 0.01 * (m + n) for n in range(7)] for m in range(4)]})

    rerun = [confirmed(genome, seed, 0.5 + seed / 10) for genome in ("0-3-5", UNIFORM, "1-3-6") for seed in (1, 2)]
    layers = known_layers([*rerun, scored(3, "0-3-5", 0.7)], LossConfig(embedding=0.0))
    text = write_report(tmp_path / "r", facts(), EVALUATIONS, {}, CONFIRMED, {}, layers=layers).read_text()
    rows = rows_of(text, "student layer")
    assert [(row["student layer"], row["mapping"]) for row in rows] == [
        (layer, mapping) for layer in ("emb", "1", "2", "3") for mapping in ("0-3-5 (winner)", "2-4-6 (uniform)")
    ]
    assert (rows[0]["emb"], rows[2]["2"], rows[3]["2"], rows[4]["3"]) == (".65", ".68", r".68\*", r".70\*")
    assert sum(cell.endswith(r"\*") for row in rows for cell in row.values()) == 2 + 3
    assert "Means over new seeds: 2 of 0-3-5 and 2 of 2-4-6." in text
    trained = known_layers(rerun, LossConfig(hidden=0.0))["0-3-5"].trained
    assert trained == {(0, 0), (2, 3), (3, 5)}
    of_uniform = write_report(
        tmp_path / "u", facts(), EVALUATIONS, {}, {UNIFORM: {1: 0.7}}, {}, layers=layers
    ).read_text()
    assert {row["mapping"] for row in rows_of(of_uniform, "student layer")} == {"2-4-6 (uniform)"}
    for without in ({}, known_layers([scored(1, UNIFORM, 0.7)], LossConfig()), {"1-3-6": layers["1-3-6"]}):
        text = write_report(tmp_path / "w", facts(), EVALUATIONS, {}, CONFIRMED, {}, layers=without).read_text()
        assert "Which layers know what" not in text


def test_every_table_is_one_for_github(tmp_path: Path) -> None:
    changes = {"second_objective": "deepest_layer", "teacher": "a|b", "tasks": ("SST-2", "x|y")}
    text = write_report(tmp_path / "r", facts(**changes), EVALUATIONS, {"a|b": EVALUATIONS}, CONFIRMED, {}).read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 8
    for table in tables:
        cells = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table
        assert re.fullmatch(r"\|( :?---:? \|)+", table.splitlines()[1].replace(":---", "---"))


def test_the_leaderboard_reads_back(tmp_path: Path) -> None:
    write_report(tmp_path / "report", facts(), EVALUATIONS, {}, {}, {})
    with (tmp_path / "report" / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["genome"]) for row in rows] == [
        ("1", "0-3-5"), ("2", UNIFORM), ("3", "4-5-6"), ("4", "0-0-0"), ("", "6-6-6"), ("", "1-1-1"),
    ]  # fmt: skip
    assert float(rows[0]["fitness"]) == float(rows[0]["fitness_seed_0"]) == 0.72
    assert float(rows[1]["SST-2"]) == pytest.approx(0.8)
    assert (rows[1]["heuristics"], rows[1]["trial"], rows[1]["seconds"]) == ("uniform", "0", "20.0")
    assert rows[4]["message"] == "RuntimeError: a | b\nnot *finite*"
    assert (rows[4]["fitness"], rows[4]["outcome"], rows[5]["fitness_step_20"]) == ("", "diverged", "0.5")


def test_names_of_equal_heuristics_are_joined(tmp_path: Path) -> None:
    space = Space(student_layers=2, teacher_layers=2)
    text = write_report(tmp_path / "r", facts(space), [scored(0, "1-2", 0.5)], {}, {}, {}).read_text()
    assert rows_of(text, "place")[0]["heuristic"] == "uniform last first"


def test_intermediate_scores_are_judged_by_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    late = rng.random(16)
    noisy = [dict(enumerate([float(rng.random()), float(value)])) for value in late]
    space = Space(student_layers=3, teacher_layers=6)
    evaluations = [
        scored(i, space.text(space.at(i)), float(value), reports={20: noisy[i][0], 40: noisy[i][1] ** 3})
        for i, value in enumerate(late)
    ]
    text = report_text(facts(), evaluations, {}, {}, {}, [], best_yaml=tmp_path / "best.yaml")
    early, close = rows_of(text, "step")
    want = stats.spearmanr([one.reports[20] for one in evaluations], late).statistic
    assert (early["Spearman with final fitness"], early["trials with both"]) == (f"{want:.2f}", "16")
    assert close["Spearman with final fitness"] == "1.00"
    assert close["final best quarter in the better half"] == "4 of 4"
    assert "From step 40 on the order is close to the final one" in text
    bad = [replace(one, reports={20: one.reports[20]}) for one in evaluations]
    assert "do not trust search.halving" in report_text(facts(), bad, {}, {}, {}, [], best_yaml=tmp_path / "b")
    few = report_text(facts(), evaluations[:5], {}, {}, {}, [], best_yaml=tmp_path / "b")
    assert "too few to trust halving" in few


def by_layer_3(*, noise: float, count: int = 60) -> list[Evaluation]:
    """Student layer 3 should learn from teacher layer 6, above all for STS-B; the others do not matter."""
    space, rng = Space(student_layers=3, teacher_layers=6), np.random.default_rng(3)
    found = []
    for number, place in enumerate(rng.permutation(space.size())[:count]):
        genes = space.at(int(place))
        scores = {
            "SST-2": 0.7 + 0.01 * genes[2] + noise * float(rng.normal()),
            "STS-B": 0.5 + 0.1 * (genes[2] == 6) + noise * float(rng.normal()),
            "MRPC": 0.7,
        }
        fitness = fitness_of(scores, YARDSTICK.scales)
        found.append(replace(scored(number, space.text(genes), fitness), scores=scores))
    return found


def page(tmp_path: Path, evaluations: list[Evaluation]) -> str:
    text = write_report(tmp_path / "report", facts(), evaluations, {}, {}, {}).read_text()
    _, _, section = text.partition("## Which student layer matters\n\n")
    return section.partition("\n\n## ")[0]


def test_the_layer_that_matters_is_named_with_its_interval_and_its_tasks(tmp_path: Path) -> None:
    section = page(tmp_path, by_layer_3(noise=0.01))
    sentence, picture = section.split("\n\n")[:2]
    assert re.match(
        r"\*\*Student layer 3 matters most\*\* \(\d+ %.*learning from teacher layer 6 is worth \+0\.\d{4} \(95 % ",
        sentence,
    )
    assert "No choice is clearly better or worse for student layer 1." in sentence
    assert picture == "![What each teacher layer is worth to each student layer](effects.png)"
    rows = rows_of(section, "student layer")
    assert [row["student layer"] for row in rows] == ["1", "2", "3"]
    assert rows[2]["best from"] == "6"
    by_task = rows_of(section[section.index("By task") :], "student layer")
    assert list(by_task[0]) == ["student layer", "SST-2", "STS-B"]
    assert re.match(r"\d\d %; 6: \+0\.1\d\d \(\+0\.", by_task[2]["STS-B"])  # .1 of a gap of .55, less its mean
    assert re.search(r"Fitted to 60 evaluations; .*: 0\.9\d fitness, 0\.[89]\d SST-2, 0\.9\d STS-B", section)
    assert "says little" not in section


@pytest.mark.parametrize(
    ("kind", "best", "want"),
    [
        ("layers", lambda genes: genes[0] == 0, r"layer 1 \(start\) matters most.*, starting at random is worth"),
        (
            "both",
            lambda genes: genes[4] == 2,
            r"layer 2 \(start\) matters.* starting from teacher layer 2 is worth",
        ),
        (
            "both",
            lambda genes: genes[4] == -1,
            r"layer 2 \(start\) .* from the layer that it learns from is worth",
        ),
        ("both", lambda genes: genes[0] == 0, r"layer 1 matters most.* learning from none is worth"),
    ],
)
def test_kept_layers_are_genes_of_the_page(tmp_path: Path, kind: str, best: Callable, want: str) -> None:
    space, rng = Space(student_layers=3, teacher_layers=3, kind=kind), np.random.default_rng(0)
    genomes = dict.fromkeys(space.random(rng) for _ in range(90))
    noisy = {genes: 0.5 + 0.1 * best(genes) + float(rng.normal(0, 0.001)) for genes in genomes}
    evaluations = [scored(i, space.text(genes), fitness) for i, (genes, fitness) in enumerate(noisy.items())]
    text = write_report(tmp_path / "report", facts(space), evaluations, {}, {}, {}).read_text()
    assert re.search(want, text.replace("**", ""))


def test_noise_names_no_layer(tmp_path: Path) -> None:
    evaluations = by_layer_3(noise=3.0)
    section = page(tmp_path, evaluations)
    assert section.startswith("No teacher layer is clearly better or worse than another for any student layer: 60 eval")
    assert "no single pair is clear" in section
    assert "So low a correlation says little" in section


def test_a_few_evaluations_have_no_page_of_layers(tmp_path: Path) -> None:
    assert page(tmp_path, by_layer_3(noise=0.01, count=7)) == ""


def test_a_layer_whose_pair_matters_is_named_with_its_partner(tmp_path: Path) -> None:
    space = Space(student_layers=2, teacher_layers=6)
    evaluations = [
        scored(i, space.text(genes), 0.5 + 0.1 * ((genes[0] > 3) == (genes[1] > 3))) for i, genes in enumerate(space)
    ]
    one_task = replace(YARDSTICK, scales={"SST-2": YARDSTICK.scales["SST-2"]})
    text = write_report(tmp_path / "r", facts(space, yardstick=one_task), evaluations, {}, {}, {}).read_text()
    assert re.search(
        r"Pairs of student layers make \d\d %.*; the largest clear ones: 1 from \d with 2 from \d \+0\.0", text
    )
    assert "By task: the share" not in text


def test_the_front_has_no_genome_that_another_beats_in_both(tmp_path: Path) -> None:
    found = [("2-4-6", 0.7), ("1-2-3", 0.69), ("1-3-3", 0.69), ("3-3-3", 0.6), ("0-0-0", 0.5), ("1-1-5", 0.65)]
    evaluations = [scored(i, genome, fitness) for i, (genome, fitness) in enumerate(found)]
    text = report_text(
        facts(second_objective="deepest_layer"), evaluations, {}, {}, {}, [], best_yaml=tmp_path / "best.yaml"
    )
    front = rows_of(text, "deepest teacher layer")
    assert [(row["deepest teacher layer"], row["genome"]) for row in front] == [
        ("6", "2-4-6"), ("3", "1-2-3"), ("0", "0-0-0"),
    ]  # fmt: skip


def assert_pictures(folder: Path, want: set[str]) -> None:
    text = (folder / "REPORT.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.+?\]\((.+?)\)", text)) == want == {path.name for path in folder.glob("*.png")}
    for name in want:
        with Image.open(folder / name) as image:
            assert 600 <= image.width <= 3000, name
            assert 300 <= image.height <= 3000, name
            pixels = np.asarray(image.convert("RGB"))
        assert (pixels[0, 0] == 255).all(), name
        inked = float((pixels < 250).any(axis=2).mean())
        assert 0.003 < inked < 0.9, (name, inked)


FOUR = {"best_so_far.png", "generations.png", "genes.png", "early_late.png"}


@pytest.mark.parametrize(
    ("space", "count", "confirm", "want"),
    [
        (Space(student_layers=3, teacher_layers=6), 60, True, FOUR | {"effects.png", "seed_noise.png"}),
        (
            Space(student_layers=6, teacher_layers=12, separate_attention=True),
            30,
            True,
            FOUR | {"effects.png", "seed_noise.png"},
        ),
        (Space(student_layers=3, teacher_layers=6, kind="both"), 60, False, FOUR | {"effects.png"}),
        (Space(student_layers=3, teacher_layers=6), 343, False, FOUR | {"effects.png"}),
        (Space(student_layers=3, teacher_layers=6), 1, False, FOUR),
    ],
    ids=["60", "hidden and attention", "kept layers", "343", "1"],
)
def test_pictures_are_images_with_something_in_them(
    tmp_path: Path, space: Space, count: int, confirm: bool, want: set[str]
) -> None:
    evaluations = history(space, count, generations=count != 343)
    named = [one.genome for one in rank_evaluations(evaluations)[:3]] + [space.text(space.heuristics()["uniform"])]
    rng = np.random.default_rng(1)
    confirmed = {genome: {seed: 0.7 + float(rng.normal(0, 0.01)) for seed in range(1, 5)} for genome in named}
    others = {"random": history(space, 20, generations=False), "none at all": [], "one": evaluations[:1]}
    write_report(tmp_path / "report", facts(space), evaluations, others, confirmed if confirm else {}, {})
    assert_pictures(tmp_path / "report", want)


def test_a_search_without_any_fitness_says_so(tmp_path: Path) -> None:
    failed = [Evaluation(i, "2-4-6", "diverged", message="nan") for i in range(23)]
    text = write_report(
        tmp_path / "report", facts(), failed, {"random": history(Space(student_layers=3, teacher_layers=6), 5)}, {}, {}
    ).read_text()
    assert text.split("\n\n")[1].startswith("**No genome has a fitness (23 diverged)")
    assert len(rows_of(text, "trial")) == 20
    assert "3 more are in" in text
    assert "best.yaml" not in text
    assert_pictures(tmp_path / "report", set())
    assert "nothing was evaluated" in write_report(tmp_path / "empty", facts(), [], {}, {}, {}).read_text()


def test_without_confirmation_no_win_is_claimed(tmp_path: Path) -> None:
    text = report_text(facts(), EVALUATIONS, {}, {}, {}, [], best_yaml=tmp_path / "best.yaml")
    sentence = text.split("\n\n")[1]
    assert sentence.startswith(
        "**Not confirmed: 0-3-5 is best in the search and closes 0.7200 of the gap, 0.0200 more than uniform (2-4-6), "
    )
    assert "no evidence yet" in sentence
    alone = report_text(facts(), EVALUATIONS[:2], {}, {}, {}, [], best_yaml=tmp_path / "best.yaml")
    assert "Not confirmed: uniform (2-4-6) itself is best in the search" in alone
    assert "--mapping.hidden uniform" not in alone


def test_a_new_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "search" / "report"
    write_report(folder, facts(), EVALUATIONS, {}, CONFIRMED, {})
    assert (folder / "seed_noise.png").exists()
    write_report(folder, facts(), EVALUATIONS[:2], {}, {}, {})
    assert not (folder / "seed_noise.png").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["report"]  # no drafts left


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_keep_their_order_and_their_distance(places: list[float]) -> None:
    moved = spread(sorted(places), gap=LABEL_GAP)
    assert all(b - a >= LABEL_GAP - 1e-9 for a, b in itertools.pairwise(moved))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    if all(b - a > LABEL_GAP for a, b in itertools.pairwise(sorted(places))):
        assert moved == pytest.approx(sorted(places))


def test_a_winner_without_any_layer_comes_with_a_warning(tmp_path: Path) -> None:
    evaluations = [scored(0, "0-0-0", 0.75), scored(1, "2-4-6", 0.5)]
    text = report_text(facts(), evaluations, {}, {}, {}, [], best_yaml=tmp_path / "b")
    assert "lets no layer learn" in text
    assert "lets no layer learn" not in report_text(facts(), evaluations[1:], {}, {}, {}, [], best_yaml=tmp_path / "b")
