"""Files that are damaged, or that would run code if they were trusted, given to the scripts. Every start must end with
exit code 2 and one line that names the file, without a question."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import MAINS, only_error, refuse, refuse_run
from launching import Run, kill_session
from safetensors.torch import load_file
from tiny_world import TinyWorld

from engine.data.manifest import load_manifest

MakeRun = Callable[..., Run]
pytestmark = pytest.mark.faults


@pytest.fixture
def corpus(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world.corpus, tmp_path / "a corpus"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_named_before_anything_is_written(
    make_run: MakeRun, tiny_world: TinyWorld, corpus: Path, glue: Path, tmp_path: Path
) -> None:
    flip(corpus / "shard-00000.arrow")
    run = make_run("flipped", data__path=corpus)
    said = f"error: {corpus}/shard-00000.arrow: its bytes have changed since it was written"
    assert refuse_run(run).startswith(said)
    words = ["--teacher.path", str(tiny_world.teacher), "--student.layers", "2", "--student.hidden_size", "16"]
    words += ["--data.path", str(corpus), "--task.data_dir", str(glue), "--proxy.steps", "6"]
    words += ["--train.warmup_steps", "2", "--genomes", "1-3"]
    proxy = Run(tmp_path / "proxy", argv=words, script="proxy.py")
    assert only_error(proxy.finish(expect=2)).startswith(said)


def test_a_corpus_of_another_tokenizer(make_run: MakeRun, tiny_world: TinyWorld, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_world.teacher, tmp_path / "other teacher"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"today"', '"tomorrow"'))
    said = refuse_run(make_run("tokenised", teacher__path=other))
    assert "data.path: the corpus was tokenised with" in said
    assert f"--tokenizer {other}" in said


@pytest.mark.launcher
def test_damage_that_rank_1_finds_while_training_ends_the_job(make_run: MakeRun, corpus: Path) -> None:
    """The second shard, which is rank 1's to check, comes from a disk that takes its time: a pipe."""
    pipe = corpus / "shard-00001.arrow"
    os.mkfifo(pipe)
    manifest = load_manifest(corpus)
    shard = replace(manifest.shards[0], file=pipe.name, size=0, sequences=0, tokens=0)
    replace(manifest, shards=[manifest.shards[0], shard]).write(corpus)
    run = make_run("torn", ranks=2, data__path=corpus, train__steps=10**6)
    process = run.start()
    try:
        run.wait_for_step(3, process)
        pipe.write_text("other bytes")
        output, _ = process.communicate(timeout=100)
    finally:
        kill_session(process)
    assert process.returncode == 2, output
    assert output.count(f"error: {pipe}: its bytes have changed") == 1, output  # said once, by rank 0
    assert "Traceback" not in output


def plant(folder: Path, marker: Path) -> None:
    """Python code that a model's folder may bring along."""
    (folder / "theirs.py").write_text(
        f"from transformers import BertConfig, BertTokenizerFast\nopen({str(marker)!r}, 'w').close()\n"
        "class Config(BertConfig):\n    model_type = 'theirs'\n\n\nclass Tokenizer(BertTokenizerFast):\n    pass\n"
    )


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_code_that_comes_with_a_model_is_never_run(make_run: MakeRun, tiny_world: TinyWorld, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    model = Path(shutil.copytree(tiny_world.teacher, tmp_path / "model"))
    plant(model, marker)
    change(model / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    refusal = "asks for Python code that comes with the model (auto_map), and such code is never run"
    for script, key, words in (
        ("distill", "teacher.path", ["--teacher.path", model, "--output_dir", tmp_path / "distilled"]),
        ("finetune", "model.path", ["--model.path", model, "--output_dir", tmp_path / "tuned"]),
    ):
        said = refuse(script, *words)
        assert said.startswith(f"error: {key}={str(model)!r}: ")
        assert refusal in said

    tokenizer = Path(shutil.copytree(tiny_world.teacher, tmp_path / "tokenizer"))
    plant(tokenizer, marker)
    (tokenizer / "tokenizer.json").unlink()
    change(
        tokenizer / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["theirs.Tokenizer"] * 2},
    )
    change(tokenizer / "config.json", model_type="theirs")
    words = ["--tokenizer", tokenizer, "--output_dir", tmp_path / "corpus"]
    words += ["--sources", json.dumps([{"path": str(tiny_world.text)}])]
    said = refuse("prepare_data", *words)
    assert f"tokenizer={str(tokenizer)!r}: its tokenizer asks for Python code that comes with the model" in said
    assert not marker.exists()


class Runs:
    """What a pickle can hold."""

    def __init__(self, marker: Path) -> None:
        self._command = f"touch '{marker}'"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def test_pickled_weights_only_when_asked_for_and_then_only_tensors(
    make_run: MakeRun, tiny_world: TinyWorld, glue: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_world.teacher, tmp_path / "pickled"))
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    run = make_run("pickled", teacher__path=model)
    said = refuse_run(run)
    assert said.startswith(f"error: teacher.path={str(model)!r}: its weights are in pytorch_model.bin, a Python pickle")
    assert ".save_pretrained('NEW')" in said
    assert "allow_pickle=true" in said
    student = make_run("pickled student")
    for key in ("--student.layers", "--student.hidden_size", "--student.init"):
        at = student.argv.index(key)
        del student.argv[at : at + 2]
    assert f"student.path={str(model)!r}: its weights are in" in only_error(
        student.finish("--student.path", str(model), expect=2)
    )
    words = ["--model.path", model, "--output_dir", tmp_path / "tuned", "--task.data_dir", glue]
    assert f"model.path={str(model)!r}: its weights are in" in refuse("finetune", *words)

    dry = ["--dry_run", "--allow_pickle"]
    assert "teacher" in run.finish(*dry)
    marker = tmp_path / "marker"
    torch.save({**weights, "extra": Runs(marker)}, model / "pytorch_model.bin")
    refused = f"teacher.path: {model / 'pytorch_model.bin'} is torn, or holds something else than tensors"
    assert refused in refuse_run(run, *dry)
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Runs(marker), file)
    assert refused in refuse_run(run, *dry)
    assert not marker.exists()


@pytest.mark.parametrize("script", MAINS)
def test_yaml_makes_no_objects(script: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    started = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    path = tmp_path / "config.yaml"
    for text in (
        f'output_dir: !!python/object/apply:os.system ["touch {marker}"]\n',
        f"teacher: {json.dumps(started)}\n",
        f"run: {json.dumps(started)}\n",
        json.dumps(started),
    ):
        path.write_text(text)
        refuse(script, "--config", path)
    time.sleep(0.2)  # for a child to do its work
    assert not marker.exists()


def test_scripts_of_data_sets_are_not_run(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """A folder with the script of a data set is a folder without text; named as a hub data set it is refused by
    `datasets`, which knows scripts no more."""
    marker = tmp_path / "marker"
    folder = tmp_path / "sayings"
    folder.mkdir()
    (folder / "sayings.py").write_text(f"import datasets\nopen({str(marker)!r}, 'w').close()\n")
    words = ["--tokenizer", tiny_world.teacher, "--output_dir", tmp_path / "corpus"]
    assert str(folder) in refuse("prepare_data", *words, "--sources", json.dumps([{"path": str(folder)}]))

    from engine.data.prepare.formats import hub_dataset_column
    from engine.errors import UserError

    with pytest.raises(UserError, match="scripts are no longer supported"):
        next(hub_dataset_column(str(folder), config_name=None, split="train", column="text"))
    assert not marker.exists()
