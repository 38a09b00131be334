"""Writes docs/configuration.md from the dataclasses of engine/config.py: `python -m engine.config_docs`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import Any

from engine import config

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRO = """\
# Configuration

Generated from `engine/config.py` by `make docs`; do not edit.

Every script takes `--config FILE.yaml` and any field as `--section.field value`; the command line wins over the file.
`--help` lists the fields, `--print_config` prints the resolved file. A mistake names key, value and remedy, and exits
with code 2 before any model is loaded. How a run executes (precision, ZeRO stage, offload, micro batch) is set in one
file of [ds_configs](../ds_configs/README.md).
"""


def field_docs(cls: type[Any]) -> dict[str, str]:
    """field -> the string literal that follows it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            value = following.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[node.target.id] = " ".join(value.value.split())
    return docs


def rows(cls: type[Any], prefix: str = "") -> list[str]:
    """One table row per plain field; fields that are sections are left to `sections`."""
    docs, out = field_docs(cls), []
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(default):
            continue
        shown = "required" if default is dataclasses.MISSING else "unset" if default is None else f"`{default}`"
        out.append(f"| `{prefix}{f.name}` | {shown} | {docs[f.name].replace('|', chr(92) + '|')} |")
    return out


def table(title: str, cls: type[Any], prefix: str = "") -> str:
    return "\n".join([f"## {title}", "", "| key | default | meaning |", "| --- | --- | --- |", *rows(cls, prefix), ""])


def render() -> str:
    parts = [INTRO, "# `deepspeed launch/distill.py`\n", table("Top level", config.RunConfig)]
    for f in dataclasses.fields(config.RunConfig):
        if f.default_factory is not dataclasses.MISSING:
            parts.append(table(f.name, type(f.default_factory()), f"{f.name}."))
    parts += ["# `python launch/prepare_data.py`\n", table("Top level", config.PrepareConfig)]
    parts.append(table("Each entry of `sources`", config.SourceConfig))
    parts += ["# `python launch/export.py`\n", table("Top level", config.ExportConfig)]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
