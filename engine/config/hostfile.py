"""DeepSpeed's hostfile and .deepspeed_env. No torch here."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path

from engine.config.checks import Problem, refuse
from engine.config.nodes import read_text
from engine.errors import UserError

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)(?:\s+max_slots=\d+)?(?:\s+#.*)?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""More than that would be an option of ssh, a user, a port, or several hosts to --include or pdsh."""
MOST_SLOTS = 1024


def parse_hostfile(path: Path) -> dict[str, int]:
    """Returns the number of slots of each host, in the order of the file.

    The format is DeepSpeed's: lines like `worker-1 slots=8`, and # comments.

    Raises SettingsError naming file and lines for what DeepSpeed would refuse, for a host without slots, and for what
    is no host's name.
    """
    hosts: dict[str, int] = {}
    problems: list[Problem] = []
    lines = read_text(path).splitlines()
    if path.read_bytes().startswith(BOM_UTF8):
        text = "a byte order mark, which DeepSpeed would take for a part of the name; save the file without it"
        problems.append(Problem(text, source=str(path), line=1))
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            host, slots = _host(line)
            if host in hosts:
                raise UserError(f"host {host!r} occurs twice; give each host one line")
        except UserError as error:
            problems.append(Problem(str(error), source=str(path), line=number))
        else:
            hosts[host] = slots
    if not hosts and not problems:
        problems.append(Problem("names no host; write one line for each, e.g. worker-1 slots=8", source=str(path)))
    refuse(problems)
    return hosts


def _host(line: str) -> tuple[str, int]:
    match = _HOST_LINE.fullmatch(line)
    if match is None:
        raise UserError(f"{line!r} is not a host; write HOST slots=N, e.g. worker-1 slots=8")
    host, slots = match.group(1), int(match.group(2)[: len(str(MOST_SLOTS)) + 1])
    if not _HOST.fullmatch(host):
        raise UserError(f"host {host!r} is not a plain name; give it one in ~/.ssh/config")
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(
            f"{line!r}: a host has 1 to {MOST_SLOTS} slots; write its number of devices, or remove the line"
        )
    return host, slots


def rank_exports(environ: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """Returns what DeepSpeed's launcher, started in `cwd`, passes on to other hosts from its .deepspeed_env files.

    Raises UserError for a line that would end DeepSpeed with a traceback.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (Path.home(), cwd):  # where DeepSpeed looks; an absolute name wins over the folder
        path = folder / name
        if not path.is_file():
            continue
        lines = read_text(path).splitlines()
        for number, line in enumerate(lines, start=1):
            key, equals, value = line.partition("=")
            if not equals or not _NAME.match(key.strip()):
                raise UserError(
                    f"{os.fspath(path)}, line {number}: {line!r} is not NAME=value; write it so, without `export`, or "
                    "remove it (comments and empty lines too)"
                )
            found[key.strip()] = value.strip()
    return found
