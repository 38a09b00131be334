from pathlib import Path

import pytest

from engine.config.distill import RunConfig
from engine.config.proxy import ProxyJobConfig
from engine.errors import UserError
from engine.records.run_dir import COMPLETE, EVENT_FILES, HELD_OUT, RunDir, step_tag, tag_step


def test_only_marked_folders_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.complete_tags() == []
    for step, complete in ((100, True), (200, True), (1_000_000_000, True), (300, False)):
        folder = run.checkpoints / step_tag(step)
        folder.mkdir(parents=True)
        if complete:
            (folder / COMPLETE).write_text("{}")
    (run.checkpoints / "superseded-step-00000900").mkdir()
    (run.checkpoints / "superseded-step-00000900" / COMPLETE).write_text("{}")
    assert run.complete_tags() == ["step-00000100", "step-00000200", "step-1000000000"]


def test_a_folder_of_another_script_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("genomes: [uniform]\nteacher:\n  model: x\n")
    run.write_settings(ProxyJobConfig(genomes=["last"]))
    with pytest.raises(UserError, match=r"holds what launch/proxy.py has written; name another folder"):
        run.write_settings(RunConfig())
    assert "- last" in run.config.read_text()


def test_logs_of_an_earlier_run_are_set_aside(tmp_path: Path) -> None:
    run, events = RunDir(tmp_path), f"{EVENT_FILES}1.host"
    for text in ("first", "second"):
        run.records.write_text(text)
        for folder in (run.csv, tmp_path / HELD_OUT):
            folder.mkdir()
        for path in (tmp_path / events, tmp_path / HELD_OUT / events, run.csv / "loss.csv"):
            path.write_text(text)
        moved = run.set_aside_logs()
        assert [old.name for old, _ in moved] == ["records.jsonl", "csv", f"{EVENT_FILES}*"]
    assert run.set_aside_logs() == []
    names = ["superseded-2-records.jsonl", "superseded-2-csv", "superseded-2-tensorboard"]
    assert [new.name for _, new in moved] == names
    assert (tmp_path / "superseded-records.jsonl").read_text() == "first"
    assert (tmp_path / "superseded-2-records.jsonl").read_text() == "second"
    assert (tmp_path / "superseded-csv" / "loss.csv").read_text() == "first"
    for path in (Path(events), Path(HELD_OUT, events)):
        assert (tmp_path / "superseded-2-tensorboard" / path).read_text() == "second"
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("superseded-")]


def test_events_of_an_earlier_version_are_continued_where_they_are(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.tensorboard == tmp_path
    (tmp_path / "tensorboard").mkdir()
    assert run.tensorboard == tmp_path / "tensorboard"
    assert run.set_aside_logs() == [(tmp_path / "tensorboard", tmp_path / "superseded-tensorboard")]
    assert run.tensorboard == tmp_path


@pytest.mark.parametrize("tag", ["latest", "step-1", "step-0000010x", "../step-00000100"])
def test_what_is_not_a_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="step-00000100"):
        tag_step(tag)
