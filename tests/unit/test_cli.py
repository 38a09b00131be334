"""Mistakes on the command line, through the real scripts: one line, exit code 2, nothing loaded."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from engine import cli
from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.config.tools import PrepareConfig, SourceConfig
from engine.errors import UserError
from engine.records.run_dir import as_yaml

MISTAKES = [
    (["--loss.hiden", "3"], "unknown setting 'loss.hiden'; did you mean 'loss.hidden'?"),
    (["--trian.steps", "3"], "did you mean 'train.steps'?"),
    (["--loss.hidden", "abc"], "loss.hidden: expected a number, got abc"),
    (["--loss.hidden", "-1"], "loss.hidden=-1.0"),
    (["--loss.hidden", "nan"], "loss.hidden"),
    (["--teacher.dtype", "fp8"], "teacher.dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got fp8"),
    (["--train.warmup_steps", "1000"], "must not exceed the number of steps, 300"),
    (["--student.path", "x", "--student.layers", "3"], "student.layers=3: remove it"),
    (["--loss.preset", "tinybert", "--loss.projection", "identity"], "loss.preset='tinybert' fixes it"),
    (["--data.mlm_probability", "1.5"], "must be in [0, 1)"),
    (["--mapping.hidden", "random-each-step", "--mapping.attention", "last"], "mapping.attention='last': remove it"),
    (["--mapping.hidden", "random-each-step", "--student.init", "mapping"], "write student.init=uniform"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_name_key_value_and_remedy(argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(RunConfig, argv, "test")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["loss:\n  hiden: 1\n", "loss:\n  hidden: [\n", "bogus: 1\n"])
def test_mistakes_in_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse_config(RunConfig, ["--config", str(path)], "test")
    assert "hiden" in str(error.value) or "bogus" in str(error.value) or str(path) in str(error.value)


def test_script_exits_2_with_one_line_and_loads_no_model() -> None:
    done = subprocess.run(
        [sys.executable, "launch/distill.py", "--loss.hiden", "3"],
        cwd=ROOT,
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown setting 'loss.hiden'; did you mean 'loss.hidden'?\n"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.touch(mode=0)
    me = os.geteuid()

    def read_as_somebody_else() -> int:
        if me == 0:  # who may read everything
            os.seteuid(65534)
        try:
            return len(file.read_bytes())
        finally:
            os.seteuid(me)

    assert cli.run_main(read_as_somebody_else) == 2
    assert (
        capsys.readouterr().err
        == f"error: {file}: Permission denied; give this user the right to read it, or copy it\n"
    )


def test_an_error_of_another_rank_alone_is_said_after_a_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise UserError("no corpus on this host")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(cli, "WAIT_FOR_RANK_ZERO_S", 0.2)
    began = time.monotonic()
    assert cli.run_main(body) == 2
    signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began >= 0.2
    assert capsys.readouterr().err == "error: rank 3: no corpus on this host\n"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 7\n  warmup_steps: 2\n  lr: 5e-4\n")
    config = parse_config(RunConfig, ["--config", str(path), "--train.steps", "9", "--dry_run"], "test")
    assert (config.train.steps, config.train.warmup_steps, config.train.lr, config.dry_run) == (9, 2, 5e-4, True)


def test_switches_take_a_value_too() -> None:
    assert parse_config(RunConfig, ["--dry_run=false"], "test").dry_run is False
    assert parse_config(RunConfig, ["--student.activation_checkpointing"], "test").student.activation_checkpointing
    assert parse_config(RunConfig, ["--dry_run", "true", "--seed", "4"], "test").seed == 4


def test_mapping_texts_stay_text() -> None:
    argv = ["--mapping.hidden", "none", "--mapping.attention", "0-5-0-10"]
    mapping = parse_config(RunConfig, argv, "test").mapping
    assert (mapping.hidden, mapping.attention) == ("none", "0-5-0-10")


@pytest.mark.parametrize("argv", [["a.txt", "b c.jsonl"], ["[a.txt, {path: b c.jsonl}]"]])
def test_a_path_stands_for_its_source(argv: list[str]) -> None:
    config = parse_config(PrepareConfig, ["--sources", *argv], "test")
    assert config.sources == [SourceConfig(path="a.txt"), SourceConfig(path="b c.jsonl")]


def test_prepare_config_parses_sources() -> None:
    argv = ["--sources", '[{"path": "a.txt", "weight": 2}, {"path": "b.jsonl", "field": "body"}]']
    config = parse_config(PrepareConfig, argv, "test")
    assert [(s.path, s.weight, s.field) for s in config.sources] == [("a.txt", 2.0, None), ("b.jsonl", 1.0, "body")]


def test_generated_docs_are_fresh() -> None:
    docs = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for name, page in docs["PAGES"].items():
        assert (ROOT / "docs" / name).read_text() == page(), f"{name} is stale: run `make docs`"


HEAVY = ("torch", "transformers", "deepspeed", "datasets", "torchmetrics", "matplotlib", "tensorflow")
LIGHT = [
    *("engine.api", "ga.api"),
    *("engine.cli", "engine.mapping", "engine.config.deepspeed", "engine.config.tools", "engine.ranks.hosts.check"),
    *("engine.records.events", "engine.records.history", "engine.records.stats"),
    *("engine.tasks.load", "engine.tasks.predictions", "engine.tasks.metrics"),
    *("ga.cli", "ga.search", "ga.report.write", "ga.view.live", "engine.jobs.proxy.facts"),
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """import-linter sees our own imports; what libraries bring with them only a process shows."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not loaded.split(), f"import {module} imports {loaded}"


@pytest.mark.parametrize("looks", [["--print_config"], ["--dry_run=true", "--print_config"]])
def test_no_setting_is_the_quick_start(
    looks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "QUICKSTART_NEEDS", ("README.md",))
    with pytest.raises(SystemExit):
        cli.distill_main(looks)
    printed = capsys.readouterr().out
    expected = parse_config(RunConfig, ["--config", str(ROOT / cli.QUICKSTART), *looks[:-1]], "test")
    assert printed == as_yaml(expected)
    assert Path.cwd() == ROOT, "its paths are relative to the repository"


@pytest.mark.parametrize("words", [["--seed", "0"], ["--config", "a.yaml"], ["--dry_run", "--seed=0"], ["a.yaml"]])
def test_with_a_setting_it_is_not_the_quick_start(words: list[str]) -> None:
    assert not cli.is_quickstart(words)
    assert cli.is_quickstart([])
    assert cli.is_quickstart(["--dry_run"])


def test_the_quick_start_without_its_data_names_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICKSTART_NEEDS", ("README.md", "nowhere"))
    with pytest.raises(UserError, match=rf"^the quick start needs nowhere: run `make data` in {ROOT}$"):
        cli.go_to_quickstart()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "3"], "the defaults; command line: seed=3"),
        ([], "the defaults"),
        (["--config", "A", "--dry_run"], "A; command line: dry_run=True"),
        (
            ["--config", "A", "--config", "B", "--train.steps", "9", "--train.lr", "0.1"],
            "A; B: seed=2 (was 1); command line: train.steps=9 (was 7), train.lr=0.1",
        ),
        (["--config", "A", "--seed", "1"], "A"),
        (["--config", "B", "--seed", "1", "--seed", "4"], "B; command line: seed=4 (was 2)"),
    ],
)
def test_the_origin_of_the_settings_is_announced(words: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "A").write_text("seed: 1\ntrain: {steps: 7}\n")
    (tmp_path / "B").write_text("seed: 2\n")
    announced: list[str] = []
    parse_config(RunConfig, [str(tmp_path / w) if w in "AB" else w for w in words], "test", announced.append)
    assert [line.replace(f"{tmp_path}/", "") for line in announced] == [says]


def test_sections_in_the_origin_are_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "A").write_text("task: {custom: {mine: {train: a.tsv}}}\n")
    (tmp_path / "B").write_text("task: {custom: {faq: {kind: retrieval, folder: faq}}}\n")
    announced: list[str] = []
    words = ["--config", str(tmp_path / "A"), "--config", str(tmp_path / "B"), "--model.path", "m"]
    parse_config(FinetuneConfig, words, "test", announced.append)
    assert (
        "task.custom={'faq': {'folder': 'faq', 'kind': 'retrieval'}} (was {'mine': {'train': 'a.tsv'}})" in announced[0]
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_zero_alone_prints_the_origin(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    cli.print_origin("a.yaml")
    assert capsys.readouterr().out == ("settings    a.yaml\n" if rank == "0" else "")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (20, 2), (300, 30)])
def test_a_default_warm_up_fits_into_any_number_of_steps(steps: int, warmup: int) -> None:
    assert parse_config(RunConfig, ["--train.steps", str(steps)], "test").train.resolved_warmup_steps == warmup
    proxy = parse_config(ProxyJobConfig, ["--genomes", "1-2", "--proxy.steps", str(steps)], "test")
    assert proxy.train.as_train(steps).warmup_steps == round(steps / 3)


@pytest.mark.parametrize("given", [["--config", "FILE"], ["--config=FILE"]])
@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_wins_over_the_file_wherever_it_stands(given: list[str], first: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: from the file\nseed: 3\n")
    files, flags = [word.replace("FILE", str(path)) for word in given], ["--output_dir", "from the line"]
    config = parse_config(RunConfig, files + flags if first else flags + files, "test")
    assert (config.output_dir, config.seed) == ("from the line", 3)
