"""Marks: every setting has one, a key has the same in every script, and what is compared follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
from launching import ROOT

from engine.config.distill import LossConfig, RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.identity import FREE, describe_changes
from engine.config.marks import FIXED, Mark, how, marked_fields, result, settings, teacher_settings
from engine.config.proxy import ProxyJobConfig
from engine.config.tools import PrepareConfig
from engine.data.prepare.units import UnitSettings
from engine.records.fingerprints import flatten
from ga.config import SearchConfig

GOLDEN = ROOT / "tests" / "golden" / "settings.txt"
SCRIPTS: dict[str, Any] = {
    "distill": RunConfig(),
    "finetune": FinetuneConfig(),
    "proxy": ProxyJobConfig(genomes=["uniform"]),
    "search": SearchConfig(),
    "prepare_data": PrepareConfig(),
}


def lines() -> Iterator[str]:
    for script, config in SCRIPTS.items():
        for key, one in marked_fields(config):
            mark = one.metadata.get("mark", "NO MARK")
            yield f"{script} {key} {mark}" + (" teacher" if one.metadata.get("teacher") else "")


def test_every_setting_has_the_mark_that_was_agreed_on() -> None:
    """A new option fails here until somebody has decided whether a run that is continued may change it."""
    agreed = GOLDEN.read_text().splitlines()
    new = [line for line in lines() if line not in agreed]
    gone = [line for line in agreed if line not in list(lines())]
    assert not new, f"decide on the mark, then add to {GOLDEN}: {new}"
    assert not gone, f"remove from {GOLDEN}: {gone}"


def test_a_key_has_the_same_mark_in_every_script_that_is_continued() -> None:
    found: dict[str, set[Mark]] = {}
    for script in ("distill", "finetune", "proxy", "search"):
        for key, one in marked_fields(SCRIPTS[script]):
            found.setdefault(key, set()).add(one.metadata["mark"])
    assert not {key: marks for key, marks in found.items() if len(marks) > 1}


def test_a_setting_without_a_mark_is_an_error_wherever_marks_are_asked_for() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Forgetful:
        steps: int = result(1)
        forgotten: int = 2

    with pytest.raises(KeyError, match="mark"):
        settings(Forgetful(), Mark.RESULT)


def test_settings_are_flat_by_section_and_of_the_marks_asked_for() -> None:
    config = RunConfig(output_dir="elsewhere", seed=3, loss=LossConfig(hidden=2.0))
    fixed = settings(config, *FIXED)
    assert (fixed["loss.hidden"], fixed["seed"]) == (2.0, 3)
    assert not fixed.keys() & {"output_dir", "train.log_every", "teacher.path", "kernels.backend"}
    assert set(settings(config, *Mark)) == flatten_keys(config)
    grid = replace(FinetuneConfig().task, grid={"lr": [1e-4]})
    assert settings(replace(FinetuneConfig(), task=grid), Mark.RESULT)["task.grid.lr"] == [1e-4]


def flatten_keys(config: Any) -> set[str]:
    tree = {
        one.name: {inner.name: 0 for inner in fields(getattr(config, one.name))}
        if is_dataclass(getattr(config, one.name))
        else 0
        for one in fields(config)
    }
    return set(flatten(tree))


def test_only_what_decides_a_result_is_compared() -> None:
    saved = {"loss.hidden": 1.0, "train.log_every": 10, "train.lr": 1e-3}  # as earlier versions saved it
    now = {"loss.hidden": 2.0, "train.lr": 1e-3, "new": None}
    assert describe_changes(saved, now) == ["loss.hidden: 1.0 -> 2.0"]
    assert describe_changes({"student.layers": 3}, {}) == ["student.layers: 3 -> None"]
    assert "train.log_every" in FREE
    assert "seed" not in FREE


def test_the_teacher_cache_knows_how_to_resolve_its_settings() -> None:
    assert teacher_settings(SCRIPTS["proxy"]) == [
        "teacher.path",
        "teacher.dtype",
        "teacher.attention",
        "kernels.unpadded",
    ]


def test_what_decides_a_shard_is_in_its_settings() -> None:
    decisive = settings(PrepareConfig(), Mark.RESULT).keys()
    assert decisive <= {one.name for one in fields(UnitSettings)}


def test_a_mark_keeps_the_default_and_lets_a_setting_be_required() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Section:
        needed: int = how()
        several: list[int] = result(factory=lambda: [1, 2])

    assert Section(needed=3).several == [1, 2]
    with pytest.raises(TypeError, match="needed"):
        Section()
