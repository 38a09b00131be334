"""Logs on a disk that is full for a while. A real disk: a small tmpfs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT
from small_disk import SmallDisk, mounted
from teacher_passes import assert_same, batches, load, open_cache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoders import save_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from engine.cli import run_main
from engine.config.distill import RunConfig
from engine.errors import RunFailure, UserError
from engine.records.events import EventFile
from engine.records.files import AppendFile
from engine.records.history import History
from engine.records.records import RecordWriter, final_result, parse_record, read_records
from engine.records.run_dir import RunDir
from engine.train import failures
from engine.train.export import write_model
from engine.train.monitor import Monitor

pytestmark = pytest.mark.faults
MakeDisk = Callable[[int], SmallDisk]
LARGE = {f"term {i}": 0.5 for i in range(500)}
"""More than a page, of which a part may still fit."""


def test_a_piece_that_does_not_fit_leaves_nothing(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    path = disk.folder / "log"
    file = AppendFile(path)
    file.append(b"a" * 5000)
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        file.append(b"b" * 10_000)  # 3192 bytes fit into the page that the first piece has begun
    assert path.read_bytes() == b"a" * 5000
    disk.free()
    file.append(b"c" * 10_000)
    assert path.read_bytes() == b"a" * 5000 + b"c" * 10_000
    file.close()


def test_records_go_on_when_there_is_room_again(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    path = disk.folder / "records.jsonl"
    said: list[str] = []
    stream = io.StringIO()
    writer = RecordWriter(path, stream=stream, tell=said.append)
    for step in range(20):
        if step in (5, 13):
            disk.fill()
        if step in (10, 15):
            disk.free()
        writer.write("step", step=step, terms=LARGE)
    writer.close()
    assert [parse_record(line) is not None for line in path.read_text().splitlines()] == [True] * 15
    records = read_records(path)
    assert [r["step"] for r in records if r["kind"] == "step"] == [*range(5), *range(10, 13), *range(15, 20)]
    assert [(r["status"], r["lost"]) for r in records if r["kind"] == "run"] == [
        ("records_lost", 5),
        ("records_lost", 2),
    ]
    assert [(parse_record(line) or {})["step"] for line in stream.getvalue().splitlines()] == [*range(5, 10), 13, 14]
    outage = f"warning: {path} cannot be written (No space left on device); the job continues without it"
    assert said == [
        outage,
        f"{path} can be written again; records missing in it: 5",
        outage,
        f"{path} can be written again; records missing in it: 2",
    ]


def test_a_result_is_not_given_up(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    path = disk.folder / "records.jsonl"
    for later in (lambda writer: writer.write("run", status="finished"), lambda writer: None):
        writer = RecordWriter(path, stream=io.StringIO(), tell=lambda text: None)
        writer.write("run", status="started")
        disk.fill()
        writer.write("step", step=1, terms=LARGE)
        writer.write("result", status="done", terms=LARGE)
        assert final_result(read_records(path)) is None
        disk.free()
        later(writer)
        writer.close()
        result = final_result(read_records(path))
        assert result is not None
        assert result["status"] == "done"

    writer = RecordWriter(path, stream=io.StringIO(), tell=lambda text: None)
    writer.write("run", status="started")
    disk.fill()
    writer.write("result", status="done", terms=LARGE)
    with pytest.raises(RunFailure, match=r"records\.jsonl: the result is not in it \(No space left on device\)"):
        writer.close()
    assert final_result(read_records(path)) is None
    disk.free()


def test_a_torn_line_of_a_killed_writer_is_closed_when_there_is_room(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    path = disk.folder / "records.jsonl"
    path.write_text('@record {"kind": "st')
    disk.fill()
    writer = RecordWriter(path, stream=io.StringIO(), tell=lambda text: None)
    disk.free()
    writer.write("step", step=1)
    writer.close()
    assert [r["step"] for r in read_records(path)] == [1]


def points_of(folder: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_curves_go_on_when_there_is_room_again(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    folder = disk.folder / "tensorboard"
    said: list[str] = []
    file = EventFile(folder, tell=said.append)
    file.texts({"config": "seed: 0"}, 0)
    for step in range(20):
        if step == 5:
            disk.fill()
        if step == 10:
            disk.free()
        file.scalars({f"loss/{i}": step / 4 for i in range(500)}, step)
    file.close()
    (path,) = folder.iterdir()
    assert points_of(folder, "loss/7") == {step: step / 4 for step in (*range(5), *range(10, 20))}
    assert said == [
        f"warning: {folder} cannot be written (No space left on device); going on without curves",
        f"{folder} can be written again; events missing in between: 5",
    ]
    accumulator = EventAccumulator(str(path))
    accumulator.Reload()
    assert accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"seed: 0"]


def test_curves_of_a_job_that_starts_on_a_full_disk(small_disk: MakeDisk) -> None:
    disk = small_disk(1)
    disk.fill()
    file = EventFile(disk.folder / "tensorboard", purge_step=3, tell=lambda text: None)
    for step in range(3):
        file.scalars({f"loss/{i}": 1.0 for i in range(500)}, step)
    disk.free()
    file.scalars({"loss/7": 1.0}, 3)
    file.close()
    file.close()
    assert points_of(disk.folder / "tensorboard", "loss/7") == {3: 1.0}


def test_a_resumed_run_overwrites_the_points_past_its_checkpoint(tmp_path: Path) -> None:
    """As torch's SummaryWriter does, which these files replace."""
    first = EventFile(tmp_path, tell=print)
    for step in range(6):
        first.scalars({"loss": 1.0}, step)
    first.close()
    second = EventFile(tmp_path, purge_step=4, tell=print)
    second.scalars({"loss": 2.0}, 4)
    second.close()
    assert points_of(tmp_path, "loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_an_export_is_whole_or_not_there(small_disk: MakeDisk, tmp_path: Path) -> None:
    disk = small_disk(1)
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=4000)  # 1.5 MB
    torch.manual_seed(0)
    target = disk.folder / "student"
    target.mkdir()
    (target / "config.json").write_text("{}")
    description = {"card": {}, "head": "none", "step": 1}
    with pytest.raises(RunFailure, match=r"student cannot be written: .*No space left on device"):
        write_model(BertModel(config), description, {}, tmp_path / "none", target, history=History())
    assert [path.name for path in disk.folder.iterdir()] == ["student"]
    assert json.loads((target / "config.json").read_text()) == {}, "the export before it was touched"


def test_a_teacher_cache_without_room_costs_passes_and_not_the_job(small_disk: MakeDisk, tmp_path: Path) -> None:
    disk = small_disk(2)
    folder = disk.folder / "cache"
    said: list[str] = []
    teacher, given = load(Path(save_tiny("bert", tmp_path / "teacher"))), batches(6)
    cache = open_cache(teacher, folder, said)
    for batch in given[:2]:
        cache(batch)
    disk.fill()
    for batch in given:
        assert_same(teacher(batch), cache(batch))
    cache.close()
    assert len(said) == 1
    assert "No space left on device" in said[0]
    disk.free()
    again = open_cache(teacher, folder)
    for batch in given:
        assert_same(teacher(batch), again(batch))
    again.close()
    assert (again.hits, again.misses) == (2, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_to_a_full_disk_is_lost_and_nothing_else() -> None:
    code = (
        "import sys; from engine.records.stdout import survive_lost_readers; survive_lost_readers();"
        "print('lost', flush=True);"
        "print('more' * 10_000, flush=True); print('end', file=sys.stderr)"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.stderr == "end\n"


def test_an_output_that_was_closed_before_the_start_leads_to_nowhere(tmp_path: Path) -> None:
    code = (
        "import sys; from engine.records.stdout import survive_lost_readers; survive_lost_readers(); print('lost');"
        "file = open('file', 'w'); assert file.fileno() > 2; print(sys.stdin.read(), file=file)"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "file").read_text() == "\n"


def test_settings_on_a_full_disk(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"word {n}": n for n in range(999)})))
    with mounted(tmp_path / "disk", "8k"), pytest.raises(UserError, match="cannot be written: No space left on device"):
        RunDir(tmp_path / "disk").write_settings(RunConfig(), tokenizer=tokenizer)


def test_a_rank_without_a_run_directory_of_its_own_can_say_what_ended_it(tmp_path: Path) -> None:
    """On another host, with checkpoint.storage=local, before its first checkpoint."""
    monitor = Monitor(
        active=False,
        tensorboard=tmp_path / "run" / "tensorboard",
        records=tmp_path / "run" / "records.jsonl",
        steps=1,
        flops_per_token=1.0,
        device=torch.device("cpu"),
        config_text="",
    )
    monitor.record_from_any_rank(failures.out_of_memory(0, rank=3, why="why"))
    (record,) = read_records(tmp_path / "run" / "records.jsonl")
    assert (record["status"], record["rank"]) == ("out_of_memory", 3)


@pytest.mark.parametrize("script", ["prepare_data", "export"])
def test_an_output_that_cannot_show_a_character_shows_its_number(script: str) -> None:
    name = script.removesuffix("_data")
    code = f"import sys; from engine.cli import {name}_main as main; sys.exit(main(['--räume→=1']))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "\\xe4" in done.stderr


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")

    assert run_main(body) == 2
    assert capsys.readouterr().err == "error: the Python package 'matplotlib' is missing; pip install matplotlib\n"
