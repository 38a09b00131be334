"""What `--help` prints."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from engine.config.schema import Schema, Setting, field_docs

NAMES = {bool: "{true,false}", int: "INT", float: "NUMBER", str: "TEXT", dict: "{NAME: …}", Annotated: "PATH"}


def help_text(schema: Schema, description: str) -> str:
    parser = argparse.ArgumentParser(
        description=description, usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE] …", add_help=False
    )
    general = parser.add_argument_group("options")
    general.add_argument("--help", "-h", action="store_true", help="Print this, and stop.")
    general.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the settings below; of several the last wins."
    )
    general.add_argument("--print_config", action="store_true", help="Print the resolved file, and stop.")
    groups = {"": parser.add_argument_group("settings")}
    groups |= {name: parser.add_argument_group(name) for name in schema.sections}
    docs = {owner: field_docs(owner) for owner in {setting.owner for setting in schema.settings.values()}}
    for key, setting in schema.settings.items():
        section, _, name = key.rpartition(".")
        text = f"{docs[setting.owner][name]} ({_default(setting)})".replace("%", "%%")
        groups[section].add_argument(f"--{key}", metavar=_metavar(setting.hint), help=text)
    return parser.format_help()


def _default(setting: Setting) -> str:
    if setting.default is MISSING:
        return "required"
    if setting.default is None:
        return "default: unset"
    default = setting.default
    return f"default: {str(default).lower() if isinstance(default, bool) else default}"


def _metavar(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(_metavar(one) for one in get_args(hint)))
    if origin is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if origin is list:
        return f"{_metavar(get_args(hint)[0])} …"
    return NAMES.get(origin, "null" if origin is type(None) else "{…}")
