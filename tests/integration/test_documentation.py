"""Commands of the documentation, run on the quick start's real teacher and text (`make data`)."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_sample import write_glue_sample
from launching import ROOT, environment, finished, free_port, spawn, start
from searching import STAND_IN_DRIVER
from transformers import AutoModel, AutoTokenizer

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path, program: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) + re.findall(
        r"^    (\S.*)$", text, flags=re.MULTILINE
    )
    return [line for block in blocks for line in block.splitlines() if line.startswith(program)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


QUICKSTART = ("data/news/manifest.json", "data/reviews/dev.jsonl", "models/all-MiniLM-L6-v2/model.safetensors")
needs_quickstart = pytest.mark.skipif(
    not all((ROOT / path).is_file() for path in QUICKSTART),
    reason="the quick start's teacher, text and task are not here: run `make data`",
)
LAUNCHED = [c for d in DOCUMENTS for c in commands(d, "deepspeed") if "--hostfile" not in c]
"""Commands with a hostfile are run by tests/multinode/test_check_hosts.py."""
BANNER_SAYS = {"launch/distill.py": "student layer", "launch/finetune.py": "tasks  ", "launch/proxy.py": "fingerprint"}
SEARCHES = sorted({c for d in DOCUMENTS for c in commands(d, "python launch/search.py")})


def script_of(command: str) -> str:
    return next(word for word in command.split() if word.startswith("launch/"))


def first_of_each_script() -> list[Any]:
    """The launched commands, each once; but for the first of each script they are thorough."""
    first = {script_of(command): command for command in reversed(LAUNCHED)}
    return [
        pytest.param(command, marks=[] if command == first[script_of(command)] else pytest.mark.thorough)
        for command in dict.fromkeys(LAUNCHED)
    ]


@needs_quickstart
@pytest.mark.launcher
@pytest.mark.parametrize("command", first_of_each_script())
def test_commands_pass_every_check_up_to_the_banner(command: str, tmp_path: Path) -> None:
    """On what `make data` fetched; the GLUE download of the documents is a small sample here, and a student that the
    reader will have distilled by then is the teacher."""
    words = shlex.split(command)
    script = script_of(command)
    is_bare = words == ["deepspeed", "launch/distill.py"]  # with a setting it would be another job
    extra = [] if is_bare else ["--output_dir", str(tmp_path / "run")]
    if "glue" in command:
        write_glue_sample(tmp_path / "glue")
        extra += ["--task.data_dir", str(tmp_path / "glue")]
    if script == "launch/finetune.py":
        extra += ["--model.path", "models/all-MiniLM-L6-v2"]
    words = ["models/all-MiniLM-L6-v2" if word.startswith("runs/") else word for word in words]
    if words[1].startswith("launch/") and not is_bare:
        output = finished(start([*words[1:], *extra, "--dry_run"]), expect=0)
    else:  # with options of the launcher
        output = finished(
            spawn([*words[:1], "--master_port", str(free_port()), *words[1:], *extra, "--dry_run"]), expect=0
        )
    assert BANNER_SAYS[script] in output
    assert ("quick start: examples/quickstart.yaml" in output) == is_bare
    assert not (tmp_path / "run").exists()


@needs_quickstart
@pytest.mark.parametrize(
    "script", [STAND_IN_DRIVER, pytest.param("launch/search.py", marks=[pytest.mark.thorough, pytest.mark.launcher])]
)
@pytest.mark.parametrize("command", SEARCHES)
def test_search_commands_rehearse(command: str, script: str, tmp_path: Path) -> None:
    """With one short job in place of the measured one, or a stand-in of it. What --status shows is tested with a whole
    search."""
    small = ["--proxy.steps", "2", "--train.global_batch", "2", "--search.cohort", "1"]
    words = [word for word in shlex.split(command)[2:] if word != "--status"]
    words = ["data/news" if word == "data/news-wiki" else word for word in words]  # a document's own corpus
    if "glue" in command:
        write_glue_sample(tmp_path / "glue")
        small += ["--task.data_dir", str(tmp_path / "glue")]
    done = run([sys.executable, script, *words, *small, "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "343 genomes" in done.stdout
    assert "s per evaluation" in done.stdout


@needs_quickstart
def test_the_task_of_film_reviews_is_what_the_documentation_says() -> None:
    rows = {
        name: [json.loads(line) for line in (ROOT / "data" / "reviews" / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "dev")
    }
    texts = {name: {row["text"] for row in split} for name, split in rows.items()}
    assert not texts["train"] & texts["dev"]
    assert {row["label"] for split in rows.values() for row in split} == {"fresh", "rotten"}
    shown = f"{len(texts['train']) + len(texts['dev']):,} sentences of film reviews, labelled fresh or rotten"
    assert shown in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


@needs_quickstart
def test_the_teacher_gives_the_vectors_that_its_card_describes() -> None:
    """The card's formula: the mean of the real tokens' states, made to length 1."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    folder, texts = ROOT / "models" / "all-MiniLM-L6-v2", ["That is a happy person", "Today is a sunny and warm day"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    vectors = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(vectors, want, rtol=0, atol=1e-5)


@needs_quickstart
def test_prepare_command_finds_its_work_done() -> None:
    for command in {c for d in DOCUMENTS for c in commands(d, "python launch/prepare_data.py --config")}:
        done = run(shlex.split(command))
        assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    targets = {c for d in DOCUMENTS for c in re.findall(r"`?make (\w+)`?", d.read_text(encoding="utf-8"))} & {
        "demo", "test", "lint", "data", "docs", "format", "install",
    }  # fmt: skip
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        assert run(["make", "-n", target]).returncode == 0, target


def test_make_alone_lists_the_targets() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = run(["make", "--no-print-directory"]).stdout
    assert [line.split()[0] for line in listed.splitlines()] == phony.split()
    assert all(len(line.split()) > 1 for line in listed.splitlines())


def test_links_and_named_files_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"
        for name in re.findall(r"`((?:engine|launch|examples|ds_configs|benchmarks|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_the_table_of_faults_names_tests_that_are_marked() -> None:
    """`pytest -m faults` must reproduce each row."""
    table = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    named = {name for line in table[2:] for name in re.findall(r"`(tests/[\w./]+\.py)`", line)}
    assert len(named) > 10
    for name in named:
        assert "pytest.mark.faults" in (ROOT / name).read_text(), name


def test_there_are_commands_to_test() -> None:
    assert {script_of(command) for command in LAUNCHED} == set(BANNER_SAYS)
    assert SEARCHES
