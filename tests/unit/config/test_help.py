"""`--help`: usage, a sentence for each section, and the settings of one."""

from __future__ import annotations

from typing import Any

import pytest

from engine.cli import usage
from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.help import help_text, summary
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.config.schema import Schema
from engine.config.tools import ExportConfig, HostCheckConfig, PrepareConfig, ScoreConfig
from engine.errors import UserError
from ga.config import SearchConfig

CONFIGS = (
    *(RunConfig, FinetuneConfig, ProxyJobConfig, SearchConfig),
    *(PrepareConfig, ExportConfig, HostCheckConfig, ScoreConfig),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.__name__)
def test_every_section_has_one_sentence(config: type[Any]) -> None:
    schema = Schema(config)
    text = help_text(schema, "usage")
    for name, default in schema.sections.items():
        sentence = summary(default)
        assert sentence.endswith(".")
        assert "(*," not in sentence, "dataclasses write a signature where there is no docstring"
        assert len(sentence) < 100
        assert f"  {name:<12}{sentence}\n" in text


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.__name__)
def test_every_setting_is_in_exactly_one_part(config: type[Any]) -> None:
    schema = Schema(config)
    parts = [help_text(schema, "usage"), *(help_text(schema, "usage", name) for name in schema.sections)]
    everything = help_text(schema, "usage", "all")
    for key in schema.settings:
        assert sum(f"  --{key} " in part for part in parts) == 1, key
        assert (f"  --{key} " in everything) == ("." in key)
    words = "".join(parts).split()
    assert words.count("(default:") + words.count("(required)") == len(schema.settings)


@pytest.mark.parametrize("topic", ["train", "train.lr", "--train.lr"])
def test_a_section_is_found_by_its_name_or_a_setting(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(RunConfig, ["--help", topic] if topic[0] != "-" else [f"--help={topic}"], "usage")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("train:\n  Steps, batch and learning rate, ")
    assert "--train.lr NUMBER" in shown
    assert "--loss.hidden" not in shown


def test_an_unknown_section_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"^--help trian: no such section; there are teacher, student, .*, all$"):
        parse_config(RunConfig, ["--help", "trian"], "usage")


def test_usage_begins_with_the_command_and_two_examples() -> None:
    text = usage("distill", "Distils 100 %.", "", "--seed 3")
    assert text == (
        "usage: deepspeed launch/distill.py [--config FILE.yaml] [--SETTING VALUE] …\n\nDistils 100 %.\n\nexamples:\n"
        "  deepspeed launch/distill.py\n  deepspeed launch/distill.py --seed 3"
    )
