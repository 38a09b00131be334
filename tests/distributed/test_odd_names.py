"""Folders whose names mean something to a shell, a pattern, a format or an option parser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import refuse, succeed
from launching import ROOT, Run, environment
from odd_name import ODD_NAME
from searching import SearchRun
from tiny_world import TinyWorld
from transformers import AutoModel

from engine.data.manifest import load_manifest

pytestmark = pytest.mark.faults


@pytest.fixture
def odd(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> Path:
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    shutil.copytree(tiny_world.teacher, folder / "teacher")
    shutil.copytree(glue, folder / "glue")
    shutil.copyfile(tiny_world.text, folder / "text.txt")
    return folder


@pytest.mark.launcher
def test_every_script_works_in_a_folder_of_an_odd_name(odd: Path, make_run: Callable[..., Run]) -> None:
    """Fine-tuning and proxy jobs through the real launcher: test_finetune.py, test_proxy.py."""
    prepare = ["--output_dir", odd / "corpus", "--tokenizer", odd / "teacher", "--seq_len", 16, "--min_tokens", 2]
    succeed("prepare_data", *prepare, "--sources", json.dumps([{"path": str(odd / "text.txt")}]))
    assert load_manifest(odd / "corpus").sequences > 100

    inputs = {"teacher__path": odd / "teacher", "data__path": odd / "corpus"}
    run = make_run(f"{ODD_NAME}/distilled", ranks=2, train__steps=4, train__save_every=2, **inputs)
    run.finish()
    assert [record["step"] for record in run.steps()] == [1, 2, 3, 4]
    run.finish("--resume", "step-00000002")
    assert [record["step"] for record in run.steps()] == [1, 2, 3, 4, 3, 4]
    assert len(set(run.curve())) == 4
    assert (run.run_dir.checkpoints / "superseded-step-00000004").is_dir()
    succeed("export", "--run", run.output_dir, "--output_dir", odd / "exported")
    AutoModel.from_pretrained(odd / "exported", add_pooling_layer=False)
    assert not list(ROOT.glob("X")) + list(odd.rglob("X"))


@pytest.mark.thorough
@pytest.mark.launcher
def test_a_search_works_in_a_folder_of_an_odd_name(
    odd: Path, tiny_world: TinyWorld, make_search: Callable[..., SearchRun]
) -> None:
    corpus = shutil.copytree(tiny_world.corpus, odd / "corpus")
    settings = {"trials": 4, "population": 4, "cohort": 4, "confirm_top": 0, "task__data_dir": odd / "glue"}
    search = make_search(f"{ODD_NAME}/searched", teacher__path=odd / "teacher", data__path=corpus, **settings)
    search.finish()
    assert {one.outcome for one in search.evaluations()} == {"ok"}
    assert not list(ROOT.glob("X")) + list(odd.rglob("X"))


@pytest.mark.thorough
def test_a_leading_dash(odd: Path, make_run: Callable[..., Run]) -> None:
    """Given behind an equals sign, as any option parser wants it; relative, so that the dash comes first."""
    for name in ("teacher", "text.txt"):
        (odd / name).rename(odd / f"-{name}")
    words = ["--output_dir=-corpus", "--tokenizer=-teacher", "--seq_len", "16", "--min_tokens", "2", "--workers", "1"]
    succeed("prepare_data", *words, "--sources", json.dumps([{"path": "-text.txt"}]), cwd=odd)
    run = make_run("dash", train__steps=2)
    for key in ("--teacher.path", "--data.path"):
        at = run.argv.index(key)
        del run.argv[at : at + 2]
    own = ["--output_dir=-run", "--teacher.path=-teacher", "--data.path=-corpus"]
    command = [sys.executable, str(ROOT / "launch/distill.py"), *own, *run.argv]
    subprocess.run(command, cwd=odd, env=environment(), check=True, timeout=200)
    succeed("export", "--run=-run", "--output_dir=-exported", cwd=odd)
    AutoModel.from_pretrained(odd / "-exported", add_pooling_layer=False)


@pytest.mark.parametrize(
    ("script", "key"), [("distill", "--output_dir"), ("finetune", "--output_dir"), ("export", "--run")]
)
def test_patterns_are_refused_where_deepspeed_would_take_them_for_such(script: str, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    said = refuse(script, key, folder)
    assert said.startswith(f"error: run directory {str(folder)!r}: DeepSpeed cannot find checkpoints below")
    assert not folder.exists()
