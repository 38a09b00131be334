"""What `--help` prints: how a script is used, or the settings of a section."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import MISSING, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from engine.config.schema import Schema, Setting, field_docs
from engine.config.values import needs_a_path
from engine.errors import UserError

NAMES = {bool: "{true,false}", int: "INT", float: "NUMBER", str: "TEXT", dict: "{NAME: …}", Annotated: "PATH"}
ALL = "all"
"""What `--help` takes in the place of a section, for the settings of all."""


def help_text(schema: Schema, usage: str, topic: str = "") -> str:
    """Returns usage, options, settings of the top level and sections; with a topic (a section, one of its settings, or
    `all`) the settings there. Raises UserError for a topic that is none."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    name = topic.removeprefix("--").partition(".")[0]
    if not name:
        _add_options(parser)
        _add_settings(parser.add_argument_group("settings"), schema, "")
        return f"{usage}\n\n{parser.format_help()}{_sections(schema)}"
    if name != ALL and name not in schema.sections:
        raise UserError(f"--help {topic}: no such section; there are {', '.join([*schema.sections, ALL])}")
    for section, default in schema.sections.items():
        if name in (ALL, section):
            _add_settings(parser.add_argument_group(section, summary(default)), schema, section)
    return parser.format_help()


def summary(section: Any) -> str:
    """Returns what the docstring of a section's class says, as one line."""
    return " ".join((inspect.getdoc(type(section)) or "").split())


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options")
    what = f"Print this help, or the settings of one section, or of all sections ({ALL})."
    group.add_argument("--help", "-h", metavar="SECTION", nargs="?", help=what)
    group.add_argument("--config", metavar="FILE", help="YAML file with any of the settings; the last of several wins.")
    group.add_argument("--print_config", action="store_true", help="Print the resolved file, and stop.")
    group.add_argument("--version", action="store_true", help="Print the version of mapdistill, and stop.")


def _add_settings(group: Any, schema: Schema, section: str) -> None:
    """Adds the settings of a section to one of argparse's groups. section: its name; empty: the top level."""
    settings = [setting for key, setting in schema.settings.items() if key.rpartition(".")[0] == section]
    docs = {owner: field_docs(owner) for owner in {setting.owner for setting in settings}}
    for setting in settings:
        text = f"{docs[setting.owner][setting.key.rpartition('.')[2]]} ({_default(setting)})".replace("%", "%%")
        group.add_argument(f"--{setting.key}", metavar=value_form(setting.hint), help=text)


def _sections(schema: Schema) -> str:
    if not schema.sections:
        return ""
    rows = [f"  {name:<12}{summary(default)}\n" for name, default in schema.sections.items()]
    return f"\nsections, whose settings are --SECTION.NAME VALUE (--help SECTION lists them):\n{''.join(rows)}"


def _default(setting: Setting) -> str:
    if setting.default is MISSING:
        return "required"
    if setting.default is None:
        return "default: unset"
    default = setting.default
    return f"default: {str(default).lower() if isinstance(default, bool) else default}"


def value_form(hint: Any) -> str:
    """Returns what a value of this type looks like: its choices, or a word like NUMBER."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(value_form(one) for one in get_args(hint)))
    if origin is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if origin is list:
        return f"{value_form(get_args(hint)[0])} …"
    if isinstance(hint, type) and is_dataclass(hint):
        return "PATH|{…}" if needs_a_path(hint) else "{…}"
    return NAMES.get(origin, "null" if origin is type(None) else "{…}")
