"""Writes docs/configuration.md from the dataclasses that hold every default, and docs/checks.md from the table of
checks: `make docs`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from engine.config.distill import RunConfig
from engine.config.finetune import CustomTaskConfig, FinetuneConfig
from engine.config.help import summary, value_form
from engine.config.marks import Mark
from engine.config.proxy import ProxyJobConfig
from engine.config.schema import field_docs
from engine.config.tools import ExportConfig, HostCheckConfig, MeasureConfig, PrepareConfig, ScoreConfig, SourceConfig
from engine.hub.config import REFUSED
from engine.models.fit import CHECKS
from ga.config import SearchConfig

FOLDER = Path(__file__).resolve().parent

AS_PROXY = "As for `launch/proxy.py`."
INTRO = """\
# Configuration

Generated from the dataclasses of `engine/config/` and `ga/config.py` by `make docs`; do not edit.

Every script takes `--config FILE.yaml` and any setting as `--section.name value`. The command line overrides files; of
several files, and of a setting that is given twice on a command line, the last one wins. Within one file a setting may
occur only once. `--help` shows usage and sections, `--help SECTION` the settings of one section (`--help all`: of all),
`--print_config` the resolved file. The first line of a job says which files it read, and what the command line sets and
replaces. `launch/distill.py` without any setting runs examples/quickstart.yaml; with a setting and without `--config`,
everything else has the default below. One line reports all mistakes of all files, with file, line, value and remedy;
the exit code is 2, and no model has been loaded. One file of [ds_configs](../ds_configs/README.md) sets how a run
executes (precision, ZeRO stage, offload, micro batch).

How a value is read:

- The type of the setting decides, not YAML: `no`, `12` and `2024-01-01` are text where the setting is a text, `1e-3` is
  a number. Truth values are `true` or `false` (`yes`, `no`, `on`, `off` mean the same). Whole numbers have decimal
  digits (`1_000` is a thousand; `010` is refused) and are at most 2147483647; `inf` and `nan` are refused.
- A section without settings, and a file that has only comments, leave the defaults. `null`, `~` or nothing unsets a
  setting whose default is "unset", and is an error elsewhere. An empty text is always an error.
- `~/` at the start of a path is the home folder, in files too. Environment variables such as `$HOME` are not expanded,
  and nothing is read from or written to a URL.
- A list is `[a, b]`; on the command line also several words, or one word with commas: `--genomes uniform last`.
- Files are UTF-8. Anchors, aliases and `<<` work. A JSON file is valid YAML and is read as such.

"continued" says what may change when the same command continues a run: `fixed` settings may not, `free` ones may;
`same content` allows another path with the same content.
"""


BAR = "\\|"
CONTINUED = {Mark.RESULT: "fixed", Mark.EVALUATION: "fixed", Mark.INPUT: "same content", Mark.HOW: "free"}
"""What a mark lets a user change when the same command is started again."""


def rows(instance: Any, prefix: str) -> list[str]:
    """One table row per plain field; fields that are sections are left to `script`."""
    docs, hints, out = field_docs(type(instance)), get_type_hints(type(instance), include_extras=True), []
    for f in dataclasses.fields(instance):
        default = getattr(instance, f.name)
        if dataclasses.is_dataclass(default):
            continue
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        shown = "required" if required else "unset" if default is None else f"`{default}`"
        may_change = CONTINUED.get(f.metadata.get("mark"), "")
        cells = (f"`{prefix}{f.name}`", f"`{value_form(hints[f.name])}`", shown, may_change, docs[f.name])
        out.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return out


def table(title: str, instance: Any, prefix: str = "") -> str:
    lines = [f"## {title}", "", *([summary(instance), ""] if prefix else [])]
    lines += ["| key | value | default | continued | meaning |", "| --- | --- | --- | --- | --- |"]
    lines += [*rows(instance, prefix), ""]
    return "\n".join(lines)


def script(command: str, instance: Any, same: dict[str, str] | None = None) -> list[str]:
    """A chapter. same: sections that stand elsewhere -> what to say of them."""
    parts = [f"# `{command}`\n", table("Top level", instance)]
    for f in dataclasses.fields(instance):
        section = getattr(instance, f.name)
        if not dataclasses.is_dataclass(section):
            continue
        if same and f.name in same:
            parts.append(f"## {f.name}\n\n{same[f.name]}\n")
        else:
            parts.append(table(f.name, section, f"{f.name}."))
    return parts


def render() -> str:
    """The whole page. Fields without a default are shown for instances that need one."""
    as_above = "As for `launch/distill.py`."
    fine = {"mapping": as_above, "optim": as_above}
    proxy = dict.fromkeys(("teacher", "loss", "optim"), as_above)
    proxy |= {
        "student": "As for `launch/distill.py`, but `init` is `uniform` when unset.",
        "data": "As for `launch/distill.py`, but nothing is held out.",
        "task": "The first five keys of `task` of `launch/finetune.py`; `train_rows` is 2000 when unset.",
    }
    parts = script("deepspeed launch/distill.py", RunConfig())
    parts += script("deepspeed launch/finetune.py", FinetuneConfig(), fine)
    parts.append(table("Each entry of `task.custom`", CustomTaskConfig()))
    parts += script("deepspeed launch/proxy.py", ProxyJobConfig(genomes=["uniform"]), proxy)
    search = dict.fromkeys(("teacher", "student", "loss", "data", "optim", "train", "task", "proxy"), AS_PROXY)
    parts += script("python launch/search.py", SearchConfig(), search)
    parts += script("python launch/prepare_data.py", PrepareConfig())
    parts.append(table("Each entry of `sources`", SourceConfig(path="a.txt")))
    parts += script("python launch/export.py", ExportConfig(run=""))
    parts += script("python launch/measure.py", MeasureConfig(models=["runs/quickstart"]))
    score = {"task": "The first five keys of `task` of `launch/finetune.py`."}
    parts += script("python launch/score.py", ScoreConfig(models=["runs/quickstart"]), score)
    parts += script("python launch/check_hosts.py", HostCheckConfig(hostfile=""))
    return "\n".join([INTRO, contents(parts), *parts])


def contents(parts: list[str]) -> str:
    """Returns a list of the chapters as links."""
    titles = [part.removeprefix("# ").strip("`\n") for part in parts if part.startswith("# ")]
    return "".join(f"- [{title}](#{re.sub(r'[^a-z_ -]', '', title).replace(' ', '-')})\n" for title in titles)


CHECKED = """\
# What is checked before a run starts

Generated from the tables in `engine/models/fit.py` and `engine/hub/config.py` by `make docs`; do not edit.

`launch/distill.py`, `launch/finetune.py`, `launch/proxy.py` and `launch/search.py` make these checks before they
create a run directory or a process group. An error is one line, with exit code 2; a note is a warning in the banner.
[data.md](data.md) and [tasks.md](tasks.md) describe the text and task files that are read, and their limits.

## Files

Each file of a model that is read (`config.json`, the tokenizer's files, the weights and their index) must be present
and complete. A git-lfs pointer, an empty or truncated file, invalid JSON, a broken link, or a missing shard of the
index is an error that names the file and the remedy. A tokenizer must have a fast version. Weights in a pickle are
read only with `allow_pickle`, and only their tensors. Weights in other formats, an adapter (`adapter_config.json`), and
a folder that only contains the model's folder are refused with the remedy. Weights that are not finite are found when
they are loaded, after the run directory was made.

## What must fit together

| | and | what is compared | otherwise |
| --- | --- | --- | --- |
{checks}

Ignored without a note: a pooler, heads beside the encoder, `position_ids` and other buffers.

## Settings of config.json that are refused

transformers or this library would ignore these settings and compute another model.

| setting | why |
| --- | --- |
{refused}
"""


def render_checks() -> str:
    """The page of checks."""
    checks = [f"| {' | '.join(check.between)} | {check.compares} | {check.otherwise} |" for check in CHECKS]
    refused = [f"| `{name}` | {why} |" for name, (_, why) in REFUSED.items()]
    return CHECKED.format(checks="\n".join(checks), refused="\n".join(refused))


PAGES: dict[str, Callable[[], str]] = {"configuration.md": render, "checks.md": render_checks}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
