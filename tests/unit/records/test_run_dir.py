from pathlib import Path

import pytest

from engine.config.distill import RunConfig
from engine.config.proxy import ProxyJobConfig
from engine.errors import UserError
from engine.records.run_dir import COMPLETE, RunDir, step_tag, tag_step


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
    run = RunDir(tmp_path)
    for text in ("first", "second"):
        run.records.write_text(text)
        run.tensorboard.mkdir()
        (run.tensorboard / text).write_text("")
        moved = run.set_aside_logs()
        assert [old for old, _ in moved] == [run.records, run.tensorboard]
    assert run.set_aside_logs() == []
    assert (tmp_path / "superseded-records.jsonl").read_text() == "first"
    assert (tmp_path / "superseded-2-records.jsonl").read_text() == "second"
    assert [p.name for p in (tmp_path / "superseded-2-tensorboard").iterdir()] == ["second"]
    assert [new.name for _, new in moved] == ["superseded-2-records.jsonl", "superseded-2-tensorboard"]


@pytest.mark.parametrize("tag", ["latest", "step-1", "step-0000010x", "../step-00000100"])
def test_what_is_not_a_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="step-00000100"):
        tag_step(tag)
