"""The campaigns of benchmarks/: what they start, what they go on with, and what their reports say of made-up rows."""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from launching import ROOT
from scipy.stats import spearmanr

from engine.records.fingerprints import digest
from engine.records.records import format_record
from engine.records.run_dir import RunDir

OWN = ("campaign", "embeddings", "evidence", "measuring", "objective", "panel", "panel_report", "pilot")
TASKS = ("SST-2", "MRPC", "STS-B")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A script of benchmarks/ as a module, with that folder first, as when it is started."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture
def campaign(load: Any) -> ModuleType:
    return load("campaign")


def answers(monkeypatch: pytest.MonkeyPatch, *, diverges: str = "") -> list[list[str]]:
    """Proxy jobs that score each genome by its digits at once; returns the words that started them."""
    started: list[list[str]] = []

    def job(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(words)
        genomes = words[words.index("--genomes") + 1 :]
        tasks = json.loads(words[words.index("--proxy.tasks") + 1])
        parts = {"code": {"mapdistill": "1+abc"}, "words": words}
        lines = [format_record("run", status="started", fingerprint_parts=parts)]
        for genome in genomes:
            if genome != diverges:
                scores = dict.fromkeys(tasks, int(genome.replace("-", "")) / 1000)
                lines.append(format_record("result", genome=genome, scores=scores, fingerprint=digest(parts)))
        folder = RunDir(Path(words[words.index("--output_dir") + 1]))
        folder.root.mkdir(exist_ok=True)
        with folder.records.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        return subprocess.CompletedProcess(words, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", job)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return started


def test_a_campaign_goes_on_where_it_stopped(campaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [campaign.Cell({"seed": str(seed)}, ("--seed", str(seed)), ("1-2-3", "0-0-0")) for seed in range(4)]
    out = tmp_path / "out.csv"
    args = argparse.Namespace(out=out, shard=(0, 1), task_dir="glue", settings=["--train.lr", "1e-4"])
    started = answers(monkeypatch)
    campaign.run(cells[:2], args)
    campaign.run(cells, args)
    assert [words[words.index("--seed") + 1] for words in started] == ["0", "1", "2", "3"]
    assert all(words[-5:] == ["--train.lr", "1e-4", "--genomes", "1-2-3", "0-0-0"] for words in started)
    rows = campaign.read([out])
    assert [(row["seed"], row["genome"]) for row in rows][:3] == [("0", "1-2-3"), ("0", "0-0-0"), ("1", "1-2-3")]
    assert rows[0]["STS-B"] == "0.123000"
    assert rows[0]["code"] == "1+abc"


def test_shards_are_the_whole(campaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [campaign.Cell({"seed": str(seed)}, (), ("1-2-3",)) for seed in range(5)]
    answers(monkeypatch)
    files = [tmp_path / "0.csv", tmp_path / "1.csv"]
    for index, out in enumerate(files):
        campaign.run(cells, argparse.Namespace(out=out, shard=(index, 2), task_dir="glue", settings=[]))
    assert [[row["seed"] for row in campaign.read([file])] for file in files] == [["0", "2", "4"], ["1", "3"]]


def test_a_chain_stays_in_one_process_and_its_rows_are_those_of_their_own_job(
    campaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = [
        campaign.Cell({"steps": steps, "cohort": cohort}, (steps,), ("1-2-3", "4-5-6"), ("CoLA",), tmp_path / cohort)
        for steps in ("60", "120")
        for cohort in ("a", "b", "c")
    ]
    started = answers(monkeypatch)
    args = argparse.Namespace(out=tmp_path / "0.csv", shard=(1, 2), task_dir="glue", settings=[])
    campaign.run(cells[:3], args)
    answers(monkeypatch, diverges="4-5-6")
    campaign.run(cells, args)
    rows = [(row["steps"], row["cohort"], row["genome"], row["CoLA"]) for row in campaign.read([args.out])]
    assert rows == [
        ("60", "b", "1-2-3", "0.123000"),
        ("60", "b", "4-5-6", "0.456000"),
        ("120", "b", "1-2-3", "0.123000"),
        ("120", "b", "4-5-6", ""),
    ]
    assert started[0][started[0].index("--proxy.tasks") + 1] == '["CoLA"]'


def test_a_genome_that_diverged_is_not_run_again_and_has_no_score(
    campaign, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [campaign.Cell({"seed": "0"}, (), ("1-2-3", "4-5-6"))]
    args = argparse.Namespace(out=tmp_path / "out.csv", shard=(0, 1), task_dir="glue", settings=[])
    started = answers(monkeypatch, diverges="4-5-6")
    campaign.run(cells, args)
    campaign.run(cells, args)
    assert len(started) == 1
    assert [row["genome"] for row in campaign.read_scored([args.out])] == ["1-2-3"]
    assert "1 of 2 students diverged" in capsys.readouterr().out


def test_a_mean_and_its_interval(campaign) -> None:
    mean, half = campaign.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, half) == (2.5, pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6))
    assert math.isnan(campaign.mean_interval([1.0])[1])


def test_objective_compares_equal_mappings_and_seeds(load, capsys: pytest.CaptureFixture[str]) -> None:
    objective = load("objective")
    rows = []
    worth = {"identity": 0.03, "fitted": 0.02, "random": 0.0}
    for (projection, gain), scale, seed, genome in itertools.product(
        worth.items(), ("none", "teacher"), ("0", "1"), ("2-4-6", "4-5-6", "0-0-0")
    ):
        noise = 0.1 * int(seed) + 0.05 * (genome == "4-5-6")  # of seed and mapping: gone in a difference
        score = 0.5 + noise + (0.0 if genome == "0-0-0" else gain + 0.01 * (scale == "teacher"))
        rows.append(
            {"steps": "60", "lr": "1e-3", "scale": scale, "projection": projection, "seed": seed, "genome": genome}
            | dict.fromkeys(TASKS, f"{score:.6f}")
            | {"core_seconds": "1.0", "code": "1"}
        )
    objective.report(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "| 60 | 1e-3 | teacher | identity | 0.6150 (0.5500) | 0.6150 (0.5500) | 0.6150 (0.5500) |" in "\n".join(
        lines
    )
    found = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in lines if " - " in line}
    assert found["identity - fitted"][:1] == ["+0.0100 ± 0.0000"]
    assert found["fitted - random"][-2:] == ["+0.0200 ± 0.0000", "8 |"]
    assert found["teacher - none"][-2:] == ["+0.0100 ± 0.0000", "12 |"]


def test_objective_has_every_combination_once(load) -> None:
    objective = load("objective")
    args = argparse.Namespace(
        steps=["60", "240"],
        lr=["1e-3", "3e-4"],
        scale=["none", "teacher"],
        projection=list(objective.PROJECTIONS),
        seeds=["0", "1"],
    )
    cells = objective.cells(args)
    assert len({tuple(cell.columns.values()) for cell in cells}) == len(cells) == 48
    assert [cell.columns["steps"] for cell in cells] == ["60"] * 24 + ["240"] * 24


def test_pilot_starts_every_genome_from_its_layers(load, monkeypatch: pytest.MonkeyPatch) -> None:
    pilot = load("pilot")
    monkeypatch.setattr(pilot, "tokens_per_step", lambda corpus: 100.5)
    args = argparse.Namespace(horizons=["240", "60"], seeds=["0", "1"], data="news", data12="news12", teacher12="e5")
    args.regimes = list(pilot.REGIMES)
    cells = list(pilot.cells(args))
    assert len({tuple(cell.columns.values()) for cell in cells}) == len(cells)
    steps = [int(cell.columns["steps"]) for cell in cells]
    assert steps == sorted(steps)  # the short ones first
    assert {cell.columns["tokens"] for cell in cells if cell.columns["steps"] == "60"} == {"6030"}
    follow = {
        cell.columns["init"]: cell.genomes
        for cell in cells
        if (cell.columns["regime"], cell.columns["seed"], cell.columns["steps"]) == ("follow", "0", "60")
    }
    assert follow == {
        "2-4-6": ("2-4-6", "0-0-0"),
        "4-5-6": ("4-5-6",),
        "1-2-3": ("1-2-3",),
        "4-2-5": ("4-2-5",),
        "1-4-6": ("1-0-6",),  # where it names no layer, that of uniform
    }
    deep = [cell for cell in cells if cell.columns["regime"] == "deep"]
    assert all("e5" in cell.settings and "news12" in cell.settings for cell in deep)
    for cell in cells:
        layers = int(cell.settings[cell.settings.index("--student.layers") + 1])
        assert {len(genome.split("-")) for genome in cell.genomes} == {layers}
    assert sum(cell.columns.get("genome") == "teacher" for cell in cells) == len(pilot.REGIMES)


def pilot_row(regime: str, genome: str, seed: int, steps: int, score: float) -> dict[str, str]:
    row = {"regime": regime, "init": "uniform", "seed": str(seed), "steps": str(steps), "tokens": str(1000 * steps)}
    row |= {"genome": genome, "core_seconds": "36.0", "code": "1"}
    return row | {"SST-2": f"{score:.6f}", "MRPC": "0.600000", "STS-B": f"{0.5 + 0.01 * seed:.6f}"}


def pilot_rows(regime: str, none: str, gains: dict[str, float]) -> list[dict[str, str]]:
    """SST-2: seeds 0.02 apart; at 60 steps all are below the start, at 240 they are above it by `gains`. MRPC: no
    difference at all. STS-B: seeds differ, mappings do not."""
    rows = [pilot_row(regime, "teacher", 0, 0, 0.9)]
    for seed in (0, 1):
        rows.append(pilot_row(regime, "start", seed, 0, 0.7))
        rows += [pilot_row(regime, none, seed, steps, 0.65 + 0.02 * seed) for steps in (60, 240)]
        rows += [pilot_row(regime, genome, seed, 60, 0.6 + 0.02 * seed) for genome in gains]
        rows += [pilot_row(regime, genome, seed, 240, 0.69 + gain + 0.02 * seed) for genome, gain in gains.items()]
    return rows


def test_pilot_says_where_mappings_differ(load, capsys: pytest.CaptureFixture[str]) -> None:
    pilot = load("pilot")
    rows = pilot_rows("copied", "0-0-0", {"2-4-6": 0.10, "4-5-6": 0.10, "1-2-3": 0.04})
    rows += pilot_rows("deep", "0-0-0-0", {"3-6-9-12": 0.01, "1-2-3-4": 0.02, "9-10-11-12": 0.0})  # never past it
    pilot.report(rows)
    text = capsys.readouterr().out
    within, between = 0.0002, 0.0012  # variance of two seeds 0.02 apart; of 0.10, 0.10 and 0.04
    found = math.sqrt((between - within / 2) / within)
    assert f"Mappings differ most in copied, by {found / 3:.1f} seed deviations (SST-2 {found:.1f} (" in text
    assert "STS-B without crossover)" in text
    assert "| SST-2 | 240 | 240,000 | 0.7000 | 0.6600 | 0.9000 | 0.7800 | 2-4-6 0.8000 | 0.0141 | 5.5 | 36 |" in text
    summary = next(line for line in text.splitlines() if line.startswith("| copied |"))
    assert summary.endswith("| 0.19 | SST-2 240, 240, MRPC -, -, STS-B -, - | 0.8 |")
    assert next(line for line in text.splitlines() if line.startswith("| deep |")).startswith(
        "| deep | - | - | - | 0.0 |"
    )


def test_pilot_takes_harm_for_no_difference(load, capsys: pytest.CaptureFixture[str]) -> None:
    pilot = load("pilot")
    pilot.report(pilot_rows("copied", "0-0-0", {"2-4-6": 0.10, "4-5-6": 0.0, "1-2-3": -0.2}))
    text = capsys.readouterr().out
    summary = next(line for line in text.splitlines() if line.startswith("| copied |"))
    assert summary.startswith("| copied | - | - | - | 0.0 |")
    assert "| SST-2 240, -, MRPC -, -, STS-B -, - |" in summary
    assert float(summary.strip("| ").rpartition(" | ")[2]) > 3
    assert text.endswith("\nMappings differ nowhere past a crossover.\n")


def test_pilot_takes_the_best_of_several_starts(load) -> None:
    pilot = load("pilot")
    rows = pilot_rows("follow", "0-0-0", {"2-4-6": 0.1, "4-5-6": 0.0})
    rows += [{**pilot_row("follow", "start", seed, 0, 0.75), "init": "4-5-6"} for seed in (0, 1)]
    assert [point.start for point in pilot.points(rows, pilot.REGIMES["follow"], "SST-2")] == [0.75, 0.75]


def test_pilot_needs_no_complete_campaign(load, capsys: pytest.CaptureFixture[str]) -> None:
    pilot = load("pilot")
    rows = pilot_rows("copied", "0-0-0", {"2-4-6": 0.1, "4-5-6": 0.0})
    for count in range(1, len(rows)):
        pilot.report(rows[:count])
    pilot.report([row for row in rows if row["seed"] == "0"])
    assert "nan" not in capsys.readouterr().out


def panel_args(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    given = {
        "regime": "deep",
        "horizons": ["120", "60"],
        "seeds": ["0", "1"],
        "cohorts": 3,
        "warm": None,
        "finetune": 8,
    }
    given |= {"data": "news", "data12": "news12", "teacher12": "e5", "work": tmp_path}
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize("regime", ["copied", "narrow", "deep"])
def test_panel_draws_the_same_mappings_of_every_stratum(load, regime: str) -> None:
    panel = load("panel")
    mappings = panel.genomes(panel.REGIMES[regime])
    assert mappings == panel.genomes(panel.REGIMES[regime])
    assert len(mappings) == len(set(mappings)) == 25
    genes = [[int(gene) for gene in mapping.split("-")] for mapping in mappings]
    assert sum(0 in one for one in genes[6:]) == 9  # half of those drawn, and none
    assert sum(one == sorted(set(one)) for one in genes[6:-1]) >= 5
    assert max(map(max, genes)) == panel.REGIMES[regime].teacher_layers


def test_panel_goes_up_its_horizons_cohort_by_cohort(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    panel = load("panel")
    monkeypatch.setattr(panel, "tokens_per_step", lambda corpus: 100.0)
    cells = list(panel.cells(panel_args(tmp_path)))
    assert [cell.columns["genome"] for cell in cells[:3]] == ["teacher", "start", "start"]
    chains: dict[Path, list[str]] = {}
    for cell in cells[3:]:
        chains.setdefault(cell.folder, []).append(cell.columns["steps"])
        kept = cell.settings[cell.settings.index("--proxy.keep_students") + 1]
        assert kept == str(cell.columns["steps"] == "120").lower()
    assert len(chains) == 6
    assert set(map(tuple, chains.values())) == {("60", "120")}
    warm = list(panel.cells(panel_args(tmp_path, warm="runs/warm")))
    assert {cell.columns["regime"] for cell in warm} == {"deep warm"}
    assert all("runs/warm" in cell.settings for cell in warm if cell.columns.get("genome") != "teacher")
    assert not {cell.folder for cell in warm} & set(chains)


def test_panel_fine_tunes_the_first_mappings(load, tmp_path: Path) -> None:
    panel = load("panel")
    args = panel_args(tmp_path, finetune=10)
    cells = list(panel.finetuned_cells(args))
    first = panel.genomes(panel.REGIMES["deep"])[:10]
    assert [(cell.columns["seed"], *cell.genomes) for cell in cells] == [(s, g) for s in ("0", "1") for g in first]
    assert cells[9].settings[1] == str(tmp_path / "deep-1-seed0" / "students" / f"{first[9]}-seed0")


def panel_rows(noise: dict[int, float]) -> list[dict[str, str]]:
    """Eight mappings, a hundredth apart; at a horizon its `noise` is added to every second one, in seed 0 alone."""
    truth = {f"{layer}-6-6": 0.7 + layer / 100 for layer in range(1, 7)} | {"0-5-6": 0.70, "6-6-5": 0.77}

    def row(genome: str, seed: int, steps: int, score: float) -> dict[str, str]:
        return {**pilot_row("copied", genome, seed, steps, score), "MRPC": f"{score:.6f}", "cohort": "0"}

    rows = [row("teacher", 0, 0, 0.9)]
    for seed in (0, 1):
        rows += [row("start", seed, 0, 0.705)] + [row("0-0-0", seed, steps, 0.7) for steps in noise]
        rows += [
            row(genome, seed, steps, score + (1 - seed) * (index % 2) * shift)
            for steps, shift in noise.items()
            for index, (genome, score) in enumerate(truth.items())
        ]
    return rows


def test_panel_compares_horizons_with_the_end_of_the_other_seed(load, capsys: pytest.CaptureFixture[str]) -> None:
    panel_report = load("panel_report")
    panel_report.report(panel_rows({60: 0.05, 240: 0.0}), TASKS)
    text = capsys.readouterr().out
    assert "## copied: 8 mappings, 2 seeds, to 240 steps" in text
    assert "### SST-2: ceiling 1.00 (1.00 to 1.00), seed deviation 0.0000" in text
    section = text[text.index("### SST-2") : text.index("### MRPC")].splitlines()
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in section[4:] if line}
    assert lines["240"][:2] == ["240,000", "72"]  # a horizon costs those before it, too
    assert lines["240"][2:5] == ["1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "1.00"]
    truth = [1, 2, 3, 4, 5, 6, 0, 7]
    early = [value + 5 * (index % 2) for index, value in enumerate(truth)]
    expected = (1 + spearmanr(early, truth).statistic) / 2  # only seed 0 is shifted
    assert lines["60"][2].startswith(f"{expected:.2f} (")
    crossed = next(line for line in text.splitlines() if line.startswith("| SST-2 | 240 |"))
    assert crossed.startswith("| SST-2 | 240 | 0.7050 | 0.7000 | 0.9000 | 0.7350 | 6-6-5 0.7700 |")


def test_panel_compares_probes_with_fine_tuning(load, capsys: pytest.CaptureFixture[str]) -> None:
    panel_report = load("panel_report")
    rows = panel_rows({60: 0.0})
    mapped = {row["genome"]: float(row["SST-2"]) for row in rows if row["seed"] == "0" and row["steps"] == "60"}
    del mapped["0-0-0"]
    finetuned = [
        {"regime": "copied", "seed": "0", "genome": genome, "finetune_seed": seed, "core_seconds": "1.0"}
        | {"SST-2": f"{1 - score + 0.01 * int(seed):.6f}"}
        for genome, score in mapped.items()
        for seed in ("0", "1")
    ]
    panel_report.report(rows, TASKS, finetuned)
    text = capsys.readouterr().out
    assert "### Fine-tuned: 8 mappings" in text
    assert "| SST-2 | -1.00 (-1.00 to -1.00) |" in text
    assert text.rstrip().endswith("| 6-6-5 0.2350 | 0-5-6 0.3050 |")


def test_panel_needs_no_complete_campaign(load, capsys: pytest.CaptureFixture[str]) -> None:
    panel_report = load("panel_report")
    rows = panel_rows({60: 0.01})
    for count in (1, 3, 8, len(rows) // 2, len(rows) - 3):
        panel_report.report(rows[:count], TASKS)
    assert "nan" not in capsys.readouterr().out
    genomes = sorted({row["genome"] for row in rows if row["seed"] == "1"})
    shard = [
        row for row in rows if row["genome"] not in genomes or (genomes.index(row["genome"]) + int(row["seed"])) % 2
    ]
    panel_report.report(shard, TASKS)
    assert "no mapping has the end of both seeds yet" in capsys.readouterr().out


@pytest.fixture
def evidence(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, argparse.Namespace]:
    """The campaign after a search that recommends 0-5-0-10."""
    module = load("evidence")
    monkeypatch.setattr(module, "tokens_per_step", lambda corpus: 100.0)
    (tmp_path / "best.yaml").write_text("mapping: {hidden: 0-5-0-10}\n")
    args = panel_args(tmp_path, search=tmp_path, steps=100, more_steps=50, seeds=3, finetuned=[])
    return module, args


def test_evidence_has_the_winner_and_uniform_in_every_seed(evidence) -> None:
    module, args = evidence
    cells = list(module.cells(args))
    mappings = [cell for cell in cells if cell.columns["students"] == "mappings"]
    assert [cell.genomes[:2] for cell in mappings] == [("0-5-0-10", "3-6-9-12")] * 3
    assert [len(cell.genomes) for cell in mappings] == [5, 5, 2]
    controls = [cell for cell in cells if cell not in mappings]
    assert {cell.genomes for cell in controls} == {("3-6-9-12",)}
    assert [cell.columns["steps"] for cell in controls] == ["100"] * 4 + ["150"] * 2
    assert len({cell.folder for cell in cells}) == len(cells)
    finetuned = list(module.finetuned_cells(args))
    assert len(finetuned) == 18
    assert finetuned[0].settings == ("--model.path", str(args.work / "seed0" / "students" / "0-5-0-10-seed0"))


def test_evidence_compares_at_equal_seeds(evidence, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module, args = evidence
    tasks = (*TASKS, *module.OTHERS)

    def row(students: str, genome: str, seed: int, score: float) -> dict[str, str]:
        scores = dict.fromkeys(tasks, f"{score + 0.1 * seed:.6f}")
        return {"students": students, "seed": str(seed), "genome": genome, **scores, "core_seconds": "36", "code": "1"}

    rows = [row("mappings", "0-5-0-10", seed, 0.53 + 0.01 * seed) for seed in range(3)]
    rows += [row("mappings", "3-6-9-12", seed, 0.50) for seed in range(3)]
    rows += [row("uniform, longer", "3-6-9-12", seed, 0.55) for seed in range(2)]
    args.report = [tmp_path / "rows.csv"]
    write_rows(args.report[0], rows)
    module.report(args)
    text = capsys.readouterr().out
    assert "| winner | 0-5-0-10 | 3 | 0.01 | 0.6400 ± 0.2733 |" in text
    assert "| uniform | 3 | +0.0400 ± 0.0248 | +0.0400 ± 0.0248 |" in text
    assert "| uniform, longer | 2 | -0.0150 ± 0.0635 |" in text
    assert text.count("## ") == 2  # nothing is fine-tuned yet


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_other_seeds_follow_the_best_learning_rate(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    module = load("embeddings")
    settings = {"corpus": "data", "steps": "20", "seeds": ["0", "1"], "shapes": ["3x192"]}
    args = argparse.Namespace(
        work=tmp_path, out=tmp_path / "out.csv", shard=(0, 1), task_dir="glue", settings=[], **settings
    )
    started: list[Any] = []

    def rows_of(cell: Any, words: list[str]) -> list[dict[str, str]]:
        started.append(cell)
        score = 1 - abs(float(cell.columns["lr"]) - 3e-4) if cell.columns["lr"] != "-" else 0
        return [{**cell.columns, **dict.fromkeys(module.SCORES, str(score)), "core_seconds": "2"}]

    monkeypatch.setattr(module, "student_rows", rows_of)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for _ in range(2):
        module.run(list(module.cells(args, module.read([args.out]))), args, rows_of)
    tried = [(cell.columns["recipe"], cell.columns["lr"]) for cell in started if cell.columns["seed"] == "0"]
    assert tried == [("start", "-"), *((recipe, lr) for recipe, rates in module.RATES.items() for lr in rates)]
    assert [cell.columns["recipe"] for cell in started if cell.columns["seed"] == "1"] == list(module.RATES)
    assert {cell.columns["lr"] for cell in started if cell.columns["seed"] == "1"} == {"3e-4"}
    theirs = next(cell for cell in started if cell.columns["recipe"] == "theirs")
    assert theirs.settings[theirs.settings.index("--student") + 1] == f"{started[0].folder}/student"


def test_the_table_of_vectors_compares_at_equal_seeds(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    module = load("embeddings")

    def row(recipe: str, lr: str, seed: str, score: float) -> dict[str, str]:
        names = {"shape": "3x384", "recipe": recipe, "lr": lr, "seed": seed, "steps": "20", "core_seconds": "2"}
        return names | dict.fromkeys(module.SCORES, f"{score:.4f}")

    rows = [row("pooled", lr, "0", score) for lr, score in (("3e-4", 0.5), ("1e-3", 0.8))]
    rows += [row("theirs", lr, "0", score) for lr, score in (("1e-4", 0.7), ("3e-4", 0.6), ("1e-3", 0.5))]
    rows += [row("pooled", "1e-3", "1", 0.7), row("theirs", "1e-4", "1", 0.5)]
    module.report(rows, dict.fromkeys(module.SCORES, "0.9"))
    printed = capsys.readouterr().out
    assert "| 3x384 | pooled | 1e-3 | 2 | 20 | 0.7500 ± 0.6353 |" in printed
    assert "| 83.3% | 2 |" in printed
    assert "| 3x384 | pooled | theirs | +0.1500 ± 0.6353 |" in printed
