"""Mistakes in the configuration of a search, and what it makes of a correct one."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.errors import UserError
from engine.jobs.proxy.facts import ProxyFacts
from ga.cli import search_main
from ga.config import SearchConfig
from ga.dry_run import notes
from ga.evolution.operators import PRESETS, Settings
from ga.jobs.pool import find_placements, visible_gpus
from ga.report.write import as_commented_yaml, best_config
from ga.search import check_budget, search
from ga.study.drivers import Driver, Drivers
from ga.study.storage import open_storage
from ga.study.studies import open_search, search_space

FACTS = ProxyFacts(
    student_layers=3,
    teacher_layers=6,
    sequences=10_000,
    seq_len=128,
    tasks=("SST-2",),
    fingerprint="f",
    fingerprint_parts={},
)


def config(*argv: str) -> SearchConfig:
    return parse_config(SearchConfig, list(argv), "test")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--search.trials", "0"], ["search.trials=0", "at least 1"]),
        (["--search.population", "1"], ["search.population=1", "at least 2"]),
        (["--search.reset_rate", "1.5"], ["search.reset_rate=1.5", "between 0 and 1"]),
        (["--search.prerank", "4", "--search.sampler", "tpe"], ["search.prerank=4", "search.sampler=ga"]),
        (["--search.space", "both", "--student.init", "last"], ["student.init='last'", "search.space=both"]),
        (["--search.space", "layers", "--student.path", "x"], ["student.path='x'", "search.space=layers"]),
        (["--search.space", "layers", "--search.separate_attention", "true"], ["search.separate_attention=True"]),
        (["--search.halving", "1"], ["search.halving=1", "> 1"]),
        (["--search.halving", "2"], ["search.halving=2", "proxy.report_at"]),
        (
            ["--search.halving", "2", "--proxy.report_at", "[20]", "--proxy.repeats", "2"],
            ["proxy.repeats=2", "search.halving"],
        ),
        (["--search.second_objective", "deepest_layer"], ["search.second_objective", "nsga2"]),
        (["--search.preset", "autotinybert", "--search.creep_rate", "0.5"], ["search.creep_rate=0.5", "remove it"]),
        (["--search.confirm_seeds", "1"], ["search.confirm_seeds=1", "confirm_top=0"]),
        (["--proxy.report_at", "[5]", "--proxy.stop_below", "{5: 0.5}"], ["proxy.stop_below", "search.halving"]),
        (["--search.sampler", "annealing"], ["search.sampler", "annealing"]),
        (["--search.popluation", "9"], ["search.popluation", "search.population"]),
        (["--data.eval_sequences", "9"], ["data.eval_sequences=9"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        config(*argv)
    for word in words:
        assert word in str(raised.value)


def test_operators_come_from_the_section_or_from_the_preset() -> None:
    assert config("--search.creep_rate", "0.5").search.operators == Settings(creep_rate=0.5)
    assert config("--search.preset", "autotinybert").search.operators == PRESETS["autotinybert"]


def test_an_exhaustive_search_needs_the_budget() -> None:
    space = search_space(config(), student_layers=3, teacher_layers=6)
    with pytest.raises(UserError, match=r"search\.trials=100: the space has 343 genomes; write search\.trials=343"):
        check_budget(config("--search.sampler", "exhaustive", "--search.trials", "100"), space)
    check_budget(config("--search.sampler", "exhaustive", "--search.trials", "343"), space)


def test_a_budget_beyond_the_space_is_said() -> None:
    placements = find_placements(hostfile=None, local_slots=None, slots_per_job=1, launcher="pdsh")
    large = config("--search.trials", "400")
    space = search_space(large, student_layers=3, teacher_layers=6)
    assert any("343 genomes" in note and "exhaustive" in note for note in notes(large, space, placements))
    assert notes(config(), space, placements) == []


def test_best_yaml_is_a_distillation_over_the_whole_corpus(tmp_path: Path) -> None:
    search = config("--student.layers", "3", "--loss.attention", "0.5", "--seed", "3")
    best = best_config(search, FACTS, "0-3-6/2-4-6")
    path = tmp_path / "best.yaml"
    path.write_text(as_commented_yaml(best, path=path, why="because"))
    read = parse_config(RunConfig, ["--config", str(path)], "test")
    assert read == best
    assert (read.mapping.hidden, read.mapping.attention) == ("0-3-6", "2-4-6")
    assert (read.student.layers, read.student.init, read.loss.attention, read.seed) == (3, "uniform", 0.5, 3)
    assert read.train.steps * read.train.global_batch + read.data.eval_sequences <= FACTS.sequences
    assert (read.train.steps + 1) * read.train.global_batch + read.data.eval_sequences > FACTS.sequences


@pytest.mark.parametrize("kind", ["both", "layers"])
def test_best_yaml_starts_from_the_kept_layers_of_the_winner(kind: str) -> None:
    best = best_config(config("--student.layers", "3", "--search.space", kind), FACTS, "1-0-6@2-4-6")
    assert (best.student.init, best.mapping.hidden) == ("1-0-6", "2-4-6")


def test_slots_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert visible_gpus() == []
    names = [
        [str(one) for one in find_placements(hostfile=None, local_slots=slots, slots_per_job=size, launcher="pdsh")]
        for slots, size in ((None, 1), (None, 2), (2, 1))
    ]
    assert names == [["localhost:0"], ["localhost:0,1"], ["localhost:0", "localhost:1"]]


def test_a_launcher_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("worker-1 slots=2\n")
    with pytest.raises(UserError, match=r"search.launcher='slurm': this machine has no sinfo, .*; install it, or name"):
        find_placements(hostfile=str(tmp_path / "hosts"), local_slots=None, slots_per_job=2, launcher="slurm")


@pytest.mark.parametrize(
    ("visible", "ids"), [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("NoDevFiles", [])]
)
def test_visible_gpus(visible: str | None, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: two'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == ids


def test_an_output_dir_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir=.*cannot be made"):
        search(config("--output_dir", str(tmp_path / "file" / "runs")))


def test_a_study_of_something_else_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    study = optuna.create_study(storage=url, study_name="lr")
    study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=1)
    mine = config("--search.storage", url, "--search.study", "lr")
    space = search_space(mine, student_layers=3, teacher_layers=6)
    with pytest.raises(UserError, match=r"study 'lr' in .* was not begun by a search; name another search\.study"):
        open_search(open_storage(url), mine, space, FACTS)
    assert study.user_attrs == {}
    assert len(optuna.load_study(storage=url, study_name="lr").trials) == 1


def test_settings_can_be_corrected_until_something_has_ended(tmp_path: Path) -> None:
    """The first job may have refused one."""
    url = f"sqlite:///{tmp_path / 'all.db'}"
    storage = open_storage(url)

    def opened(seed: str) -> optuna.Study:
        mine = config("--search.storage", url, "--search.study", "s", "--search.seed", seed)
        return open_search(storage, mine, search_space(mine, student_layers=3, teacher_layers=6), FACTS).study

    opened("0").ask()
    study = opened("1")
    assert (study.user_attrs["settings"]["search.seed"], study.trials) == (1, [])
    drivers = Drivers(study, Driver.this_process(), placements=1)
    with pytest.raises(UserError, match=r"search\.seed=2, but it was begun with 1"):
        opened("2")
    drivers.leave()
    study.tell(study.ask(), 0.5)
    with pytest.raises(UserError, match=r"search\.seed=2, but it was begun with 1"):
        opened("2")


def test_a_mistyped_storage_is_not_made_by_asking_for_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert search_main(["--status", "--search.storage", "sqlite:///stduy.db"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
