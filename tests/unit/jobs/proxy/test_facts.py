"""What a search reads of its proxy without torch: the same that a job finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from glue_sample import write_glue_sample
from sentence_folder import MEAN, surround
from tiny_world import TinyWorld

from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.errors import UserError
from engine.jobs.proxy.facts import ProxyFacts, read_facts
from engine.jobs.proxy.plan import make_proxy_plan

MAX = {"pooling_mode_max_tokens": True}
PROMPTS = {"prompts": {"query": "Q: "}}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    write_glue_sample(folder)
    return folder


def job(world: TinyWorld, glue: Path, *argv: str, teacher: Path | None = None) -> ProxyJobConfig:
    values = {"teacher.path": teacher or world.teacher, "data.path": world.corpus, "task.data_dir": glue}
    given = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return parse_config(ProxyJobConfig, ["--genomes", "none", *given, *argv], "test")


def test_they_are_those_of_a_job(tiny_world: TinyWorld, glue: Path) -> None:
    """But for what the machine decides, and for the hash of config.json, which transformers fills up."""
    config = job(tiny_world, glue)
    found, plan = read_facts(config), make_proxy_plan(config)
    facts = dict(plan.facts)
    parts = facts.pop("fingerprint_parts")
    assert facts == {
        "student_layers": found.student_layers,
        "teacher_layers": found.teacher_layers,
        "sequences": found.sequences,
        "seq_len": found.seq_len,
        "tasks": list(found.tasks),
    }
    differ = {
        f"{section}.{key}"
        for section, values in parts.items()
        for key, value in values.items()
        if found.fingerprint_parts[section].get(key) != value
    }
    assert differ == {"teacher.dtype", "teacher.config_sha256", "train.precision", "train.warmup_steps"}


def test_an_encoder_in_a_folder_of_its_own(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.teacher, tmp_path / "0_Transformer")
    surround(tmp_path, encoder="0_Transformer")
    assert read_facts(job(tiny_world, glue, teacher=tmp_path)) == read_facts(job(tiny_world, glue))
    student = [
        read_facts(job(tiny_world, glue, "--student.path", str(path))) for path in (tmp_path, tiny_world.teacher)
    ]
    assert student[0].student_layers == student[1].student_layers == 4
    hashes = [facts.fingerprint_parts["student"]["weights_sha256"] for facts in student]
    assert hashes[0] == hashes[1]
    assert make_proxy_plan(job(tiny_world, glue, teacher=tmp_path)).base.teacher_shape.layers == 4


def with_config(world: TinyWorld, folder: Path, **changes: object) -> Path:
    """Returns a teacher with another config.json; None takes a key out."""
    shutil.copytree(world.teacher, folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 4),
        ({"num_hidden_layers": None, "n_layers": 3}, 3),
        ({"inner_group_num": 2}, 8),
        ({"num_hidden_layers": None}, 12),
    ],
    ids=["BERT", "DistilBERT", "ALBERT", "the default of its class"],
)
def test_layers_are_those_of_config_json(
    tiny_world: TinyWorld, glue: Path, tmp_path: Path, changes: dict[str, object], layers: int
) -> None:
    teacher = with_config(tiny_world, tmp_path / "teacher", **changes)
    found = read_facts(job(tiny_world, glue, teacher=teacher))
    assert (found.teacher_layers, found.student_layers) == (layers, layers // 2)
    path = read_facts(job(tiny_world, glue, "--student.path", str(teacher), "--student.init", "null"))
    assert (path.teacher_layers, path.student_layers) == (4, layers)


def test_what_decides_a_fitness_changes_the_fingerprint(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> None:
    def found(*argv: str, teacher: Path | None = None) -> ProxyFacts:
        return read_facts(job(tiny_world, glue, *argv, teacher=teacher))

    base = found()
    moved = tmp_path / "moved"
    shutil.copytree(tiny_world.teacher, moved)
    assert found(teacher=moved).fingerprint == base.fingerprint
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    others = [
        found(teacher=moved),
        found(teacher=with_config(tiny_world, tmp_path / "other", layer_norm_eps=1e-5)),
        found("--proxy.steps", "7"),
        found("--task.train_rows", "5"),
        found("--proxy.tasks", "[SST-2]"),
        found(teacher=surround(shutil.copytree(tiny_world.teacher, tmp_path / "max"), pooling=MEAN | MAX)),
        found(teacher=surround(shutil.copytree(tiny_world.teacher, tmp_path / "asks"), settings=PROMPTS)),
        found(teacher=surround(shutil.copytree(tiny_world.teacher, tmp_path / "dense"), ["Pooling", "Dense"])),
    ]
    assert len({base.fingerprint, *(one.fingerprint for one in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--teacher.path", "no/such/folder"], "teacher.path='no/such/folder': no such folder"),
        (["--data.path", "no/such/corpus"], "no/such/corpus: no such folder; prepare a corpus with"),
        (["--proxy.tasks", "[CoLe]"], "did you mean 'CoLA'"),
    ],
)
def test_a_mistake_is_said_without_a_job(tiny_world: TinyWorld, glue: Path, argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        read_facts(job(tiny_world, glue, *argv))
    assert words in str(raised.value)
