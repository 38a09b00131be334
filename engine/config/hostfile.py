"""DeepSpeed's hostfile and .deepspeed_env. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import UserError

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_HOST_LINE = re.compile(r"^(\S+)\s+slots=(\d+)(?:\s.*)?$")


def parse_hostfile(path: Path) -> dict[str, int]:
    """host -> number of slots, in the order of the file (DeepSpeed's format: `worker-1 slots=8`, # comments).

    Raises UserError naming file and line for what DeepSpeed would refuse, and for a host without slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile={str(path)!r} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _HOST_LINE.match(line)
        if match is None:
            raise UserError(f"{path}, line {number}: {line!r} is not a host; write HOST slots=N, e.g. worker-1 slots=8")
        host, slots = match.group(1), int(match.group(2))
        if host in hosts:
            raise UserError(f"{path}, line {number}: host {host!r} is there twice; give each host one line")
        if host.startswith("-") or set(host) & set("@:,"):  # an option of ssh; they mean something else in --include
            raise UserError(f"{path}, line {number}: host {host!r} is no plain name; give it one in ~/.ssh/config")
        if slots < 1:
            raise UserError(f"{path}, line {number}: {line!r} has no slot; write slots=1 or more, or remove the line")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"{path} names no host; write one line for each, e.g. worker-1 slots=8")
    return hosts


def rank_exports(environ: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """What DeepSpeed's launcher, started in `cwd`, passes on to other hosts from its .deepspeed_env files.

    Raises UserError for a line that would end DeepSpeed with a traceback.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (Path.home(), cwd):  # where DeepSpeed looks; an absolute name wins over the folder
        path = folder / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{os.fspath(path)} cannot be read: {error}; write it as UTF-8 text") from None
        for number, line in enumerate(lines, start=1):
            key, equals, value = line.partition("=")
            if not equals or not _NAME.match(key.strip()):
                raise UserError(
                    f"{os.fspath(path)}, line {number}: {line!r} is not NAME=value; remove it (empty lines too)"
                )
            found[key.strip()] = value.strip()
    return found
