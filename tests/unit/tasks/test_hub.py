"""GLUE from folders that `datasets` saved and from the hub, and both SQuADs from either."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from glue_sample import write_glue_sample
from launching import ROOT
from task_checks import check_error, config_of, rows_of

from engine.config.finetune import TaskDataConfig
from engine.tasks.labels import label_meanings
from engine.tasks.load import TaskData, load_task
from engine.tasks.specs import GLUE_TASKS

HUB_NAMES = {
    "CoLA": ("sentence",),
    "SST-2": ("sentence",),
    "MRPC": ("sentence1", "sentence2"),
    "STS-B": ("sentence1", "sentence2"),
    "QQP": ("question1", "question2"),
    "MNLI": ("premise", "hypothesis"),
    "QNLI": ("question", "sentence"),
    "RTE": ("sentence1", "sentence2"),
    "WNLI": ("sentence1", "sentence2"),
}


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue sample")
    write_glue_sample(folder)
    return folder


def save_as_on_the_hub(folder: Path, data: TaskData, texts: tuple[str, ...], class_names: list[str] | None) -> None:
    """A folder as load_dataset("nyu-mll/glue", …).save_to_disk would write it; labels of test splits are -1."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    label = Value("float32") if data.spec.kind == "regression" else ClassLabel(names=class_names)
    columns = Features({**{name: Value("string") for name in texts}, "label": label, "idx": Value("int32")})
    splits = {}
    for name in data.splits:
        rows = rows_of(data, name)
        values: dict[str, list[object]] = {texts[0]: list(rows.first), "idx": list(map(int, rows.ids))}
        if rows.second is not None:
            values[texts[1]] = list(rows.second)
        labels = [-1] * len(rows) if rows.labels is None else rows.labels.tolist()
        if class_names is not None and (meant := label_meanings(class_names, data.spec)) is not None:
            labels = [-1 if i < 0 else meant.index(data.spec.labels[i]) for i in labels]
        values["label"] = list(labels)
        splits[name.replace("dev", "validation")] = Dataset.from_dict(values, features=columns)
    DatasetDict(splits).save_to_disk(str(folder))


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_saved_data_sets_give_what_the_files_give(sample: Path, tmp_path: Path, task: str) -> None:
    files = load_task(task, config_of(sample, train_rows=9), test=True)
    names = None if files.spec.kind == "regression" else list(files.spec.label_names)
    save_as_on_the_hub(tmp_path / task.lower(), load_task(task, config_of(sample), test=True), HUB_NAMES[task], names)
    saved = load_task(task, config_of(tmp_path, train_rows=9), test=True)
    assert saved.sha256 == files.sha256
    assert list(saved.splits) == list(files.splits)
    for name in files.splits:
        ours, theirs = rows_of(files, name), rows_of(saved, name)
        assert (theirs.first, theirs.second, theirs.ids) == (ours.first, ours.second, ours.ids)
        assert (theirs.labels is None) == (ours.labels is None)


def test_a_clone_of_the_hub_gives_what_the_files_give(sample: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    files = load_task("mnli", config_of(sample))
    save_as_on_the_hub(tmp_path / "saved", files, HUB_NAMES["MNLI"], list(files.spec.label_names))
    (tmp_path / "clone" / "mnli").mkdir(parents=True)
    for split, rows in load_from_disk(str(tmp_path / "saved")).items():
        half = len(rows) // 2
        for number, part in enumerate((range(half), range(half, len(rows)))):
            rows.select(part).to_parquet(tmp_path / "clone" / "mnli" / f"{split}-0000{number}-of-00002.parquet")
    assert load_task("mnli", config_of(tmp_path / "clone")).sha256 == files.sha256


@pytest.mark.parametrize("names", [["not_entailment", "entailment"], ["NOT_ENTAILMENT", "ENTAILMENT"]])
def test_a_saved_data_set_with_its_classes_in_another_order(sample: Path, tmp_path: Path, names: list[str]) -> None:
    files = load_task("rte", config_of(sample), test=True)
    save_as_on_the_hub(tmp_path / "RTE", files, HUB_NAMES["RTE"], names)
    assert load_task("rte", config_of(tmp_path)).sha256 == files.sha256


def test_classes_of_other_names_are_refused(sample: Path, tmp_path: Path) -> None:
    save_as_on_the_hub(tmp_path / "SST-2", load_task("sst2", config_of(sample)), HUB_NAMES["SST-2"], ["good", "bad"])
    words = ["SST-2:train: its classes are good, bad, and those of SST-2 negative, positive"]
    check_error(words, lambda: load_task("sst2", config_of(tmp_path)))


def test_broken_saved_data_sets(sample: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    def save(splits: dict[str, dict[str, list[object]]], name: str) -> TaskDataConfig:
        DatasetDict({key: Dataset.from_dict(rows) for key, rows in splits.items()}).save_to_disk(
            tmp_path / name / "RTE"
        )
        return config_of(tmp_path / name)

    good: dict[str, list[object]] = {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    ok = save({"train": good, "validation": good}, "ok")
    assert rows_of(load_task("rte", ok), "dev").ids == ["0"]
    config = save({"train": good, "test": good}, "splits")
    check_error(["no split 'validation'", "train, test"], lambda: load_task("rte", config))
    config = save({"train": good, "validation": {**good, "label": [2]}}, "label")
    check_error([f"{tmp_path / 'label' / 'RTE'}:validation:1: unknown label '2'"], lambda: load_task("rte", config))
    config = save({"train": good, "validation": {**good, "label": [-1]}}, "hidden")
    check_error(["validation: 1 of 1 rows have no gold label (-1 1)"], lambda: load_task("rte", config))
    half: dict[str, list[object]] = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [None, 1.0]}
    config = save({"train": good, "validation": {**half, "label": [-1, 1]}}, "half")
    check_error(["validation:1: 1 of 2 rows have no gold label (-1 1)"], lambda: load_task("rte", config))
    left = load_task("rte", replace(config, unlabelled="leave_out"))
    assert rows_of(left, "dev").first == ["c"]
    config = save({"train": {**good, "sentence2": [None]}, "validation": good}, "null")
    check_error(["train:1: 'sentence2' is None, not text"], lambda: load_task("rte", config))
    config = save({"train": {"text": ["a"], "label": [1]}, "validation": good}, "column")
    check_error(["no column 'sentence1'", "'text', 'label'"], lambda: load_task("rte", config))
    (tmp_path / "single").mkdir()
    Dataset.from_dict(good).save_to_disk(tmp_path / "single" / "RTE")
    check_error(["holds one split"], lambda: load_task("rte", config_of(tmp_path / "single")))
    for file in (tmp_path / "ok" / "RTE" / "train").glob("*.arrow"):
        file.write_bytes(b"no arrow")
    check_error(["not a readable `datasets` folder"], lambda: load_task("rte", ok))


@pytest.mark.parametrize("task", ["sst2", "squad_v2"])
def test_the_hub_out_of_reach_is_one_line_at_once(tmp_path: Path, task: str) -> None:
    code = (
        "import time, datasets; from engine.tasks.load import load_task\n"
        "from engine.config.finetune import TaskDataConfig; from engine.errors import UserError\n"
        "start = time.monotonic()\n"
        f"try: load_task({task!r}, TaskDataConfig())\n"
        "except UserError as error: print(time.monotonic() - start, error)"
    )
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    took, _, said = done.stdout.partition(" ")
    assert float(took) < 10, "huggingface_hub retried"
    hub_name = {"sst2": "nyu-mll/glue (sst2)", "squad_v2": "rajpurkar/squad_v2"}[task]
    assert re.fullmatch(r"task\.data_dir is unset, .*; set task\.data_dir to a folder.*\n", said), done.stdout
    assert said.endswith("(or take the task of examples/finetune.yaml, which `make data` fetches)\n")
    assert hub_name in said


def squad_file(folder: Path, version: str, split: str, answers: list[list[dict[str, object]]]) -> Path:
    """One text with one question per entry of `answers`."""
    questions = [
        {"id": f"{split}{i}", "question": f"what {i}", "answers": golds, **({} if golds else {"is_impossible": True})}
        for i, golds in enumerate(answers)
    ]
    data = [{"title": "t", "paragraphs": [{"context": "the small model learns", "qas": questions}]}]
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}-v{version}.json"
    path.write_text(json.dumps({"version": version, "data": data}))
    return path


ANSWER = [{"text": "small", "answer_start": 4}]


@pytest.mark.parametrize("folder", ["SQuAD", "squad"])
def test_one_folder_for_both_squads(tmp_path: Path, folder: str) -> None:
    for version, rows in (("1.1", [ANSWER] * 5), ("2.0", [ANSWER, [], ANSWER])):
        for split in ("train", "dev"):
            squad_file(tmp_path / folder, version, split, rows)
    first = load_task("squad", config_of(tmp_path, train_rows=2, dev_rows=3), test=True)
    second = load_task("squad_v2", config_of(tmp_path))
    assert [len(split) for split in first.splits.values()] == [2, 3]
    assert [len(split) for split in second.splits.values()] == [3, 3]
    assert first.splits["dev"].ids == ["dev0", "dev1", "dev2"]
    assert second.splits["train"].answers == [[(4, "small")], [], [(4, "small")]]  # type: ignore[union-attr]
    assert (first.spec.name, first.spec.kind, first.spec.defaults.seq_len) == ("SQuAD-v1.1", "span", 384)
    assert (second.spec.name, second.spec.labels, second.spec.glue) == ("SQuAD-v2", (), False)
    assert first.sha256 != load_task("squad", config_of(tmp_path)).sha256


def odd_answers() -> list[list[dict[str, object]]]:
    """One good, one elsewhere, one empty, one nowhere, one unanswerable."""
    texts = [("small", 4), ("small", 5), ("", -1), ("cafe", 3)]
    return [*([{"text": text, "answer_start": at}] for text, at in texts), []]


def test_answers_that_are_not_at_their_place_are_left_out_of_training_on_request(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        squad_file(tmp_path / "SQuAD-v2", "2.0", split, odd_answers())
    words = ["question 'train1': answer 'small' does not stand at answer_start 5 (it stands at 4)",
             "3 of 5 questions have no answer at their answer_start", "task.unlabelled=leave_out"]  # fmt: skip
    check_error(words, lambda: load_task("squad2", config_of(tmp_path)))
    data = load_task("squad2", config_of(tmp_path, unlabelled="leave_out"))
    assert data.splits["train"].ids == ["train0", "train4"]
    assert data.splits["train"].answers == [[(4, "small")], []]  # type: ignore[union-attr]
    assert data.splits["dev"].ids == [f"dev{i}" for i in range(5)]
    folder = tmp_path / "SQuAD-v2"
    assert data.warnings == (
        f"{folder}/train-v2.0.json: 3 of 5 questions have no answer at their answer_start (first 'train1') and are "
        "left out",
        f"{folder}/dev-v2.0.json: questions with an empty answer, which count as unanswerable: 1",
        f"{folder}/dev-v2.0.json: questions whose answers do not occur in their text as written (other Unicode form, "
        "other words), so that no prediction can be exactly right: 1",
        "SQuAD-v2: 2 of 5 dev rows have the texts of a training row; memorised rows score there",
    )


def test_the_first_answer_that_stands_is_learned(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        squad_file(tmp_path / "SQuAD", "1.1", split, [[{"text": "small", "answer_start": 0}, *ANSWER]])
    assert load_task("squad", config_of(tmp_path)).splits["train"].answers == [[(4, "small")]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"text": "Small", "answer_start": 4}, "it stands there in another case or Unicode form"),
        ({"text": "ｓmall", "answer_start": 4}, "it stands there in another case or Unicode form"),
        ({"text": "token", "answer_start": 4}, "it does not occur in the context"),
        ({"text": "learns", "answer_start": -6}, "answer_start -6 (it stands at 16)"),
        ({"text": "small"}, "answer_start -1 (it stands at 4)"),
        ({"text": "", "answer_start": -1}, "has an empty answer"),
    ],
)
def test_why_an_answer_cannot_be_learned(tmp_path: Path, answer: dict[str, object], says: str) -> None:
    squad_file(tmp_path / "SQuAD", "1.1", "train", [ANSWER, [answer]])
    squad_file(tmp_path / "SQuAD", "1.1", "dev", [ANSWER])
    check_error(["train-v1.1.json: question 'train1'", says], lambda: load_task("squad", config_of(tmp_path)))


def test_the_own_folder_of_squad_v2_goes_first(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        squad_file(tmp_path / "SQuAD", "1.1", split, [ANSWER])
        squad_file(tmp_path / "SQuAD2.0", "2.0", split, [ANSWER, []])
    assert len(load_task("squad_v2", config_of(tmp_path)).splits["dev"]) == 2
    assert len(load_task("squad", config_of(tmp_path)).splits["dev"]) == 1


def test_broken_squad_folders(tmp_path: Path) -> None:
    check_error("no folder SQuAD-v1.1 there", lambda: load_task("squad", config_of(tmp_path)))
    squad_file(tmp_path / "SQuAD", "1.1", "train", [ANSWER])
    check_error(["dev-v1.1.json: no such file", "train-v1.1.json"], lambda: load_task("squad", config_of(tmp_path)))


def test_saved_squad(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    for split in ("train", "dev"):
        squad_file(tmp_path / "SQuAD-v2", "2.0", split, [ANSWER, []])
    files = load_task("squad2", config_of(tmp_path))

    def rows(split: str) -> Dataset:
        answers = [{"text": ["small"], "answer_start": [4]}, {"text": [], "answer_start": []}]
        names = [f"{split}{i}" for i in range(2)]
        questions = {"id": names, "question": ["what 0", "what 1"], "context": ["the small model learns"] * 2}
        return Dataset.from_dict({**questions, "answers": answers})

    saved = tmp_path / "saved"
    for folder in ("squad_v2", "squad"):
        DatasetDict({"train": rows("train"), "validation": rows("dev")}).save_to_disk(saved / folder)
    assert load_task("squad_v2", config_of(saved)).sha256 == files.sha256
    check_error(
        ["squad:train: has questions without an answer", "SQuAD-v2"], lambda: load_task("squad", config_of(saved))
    )
