"""Values of settings, from what stands in a file or on a command line: the type says how a text is read.

So `no`, `12` or `2024-01-01` are text where text is wanted, and `1e-3` is a number where a number is wanted, whatever
YAML would make of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from engine.config.checks import Problem, collected
from engine.config.marks import PathText
from engine.config.nodes import PLAIN_TAGS, Entries, describe_node, is_null, line_of, text_of
from engine.errors import UserError

LARGEST = 2**31 - 1
"""Largest whole number: of a count, a seed, a step."""
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Truth values as YAML 1.1 writes them."""
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", re.ASCII)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Reader:
    """A reader of the value of one setting, and what is wrong in it."""

    def __init__(self, key: str, source: str) -> None:
        """source: the file; empty: the command line."""
        self.problems: list[Problem] = []
        self._key, self._source = key, source

    def read(self, node: yaml.Node, hint: Any, what: str) -> Any:
        """Returns the value of a type, or None after a problem. what: the setting's name in messages."""
        try:
            return self._value(node, hint, what)
        except UserError as error:
            self._add_problems([Problem(str(error))], node)
            return None

    def _add_problems(self, problems: Iterable[Problem], node: yaml.Node) -> None:
        """Adds problems; they are at the node, unless they know better."""
        for one in problems:
            line = one.line or line_of(node)
            self.problems.append(dataclasses.replace(one, key=self._key, source=self._source, line=line))

    def _value(self, node: yaml.Node, hint: Any, what: str) -> Any:
        if node.tag not in PLAIN_TAGS:
            raise UserError(f"{what}: tags like {node.tag!r} are not supported; write the plain value")
        origin = get_origin(hint)
        if origin in (Union, UnionType):
            return self._union(node, get_args(hint), what)
        if origin is list:
            return self._list(node, get_args(hint)[0], what)
        if origin is dict:
            return self._dict(node, get_args(hint), what)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self._record(node, hint, what)
        if origin is Annotated:
            return _path(node, what)
        if origin is Literal:
            return _choice(node, get_args(hint), what)
        return {bool: _truth, int: _whole, float: _number, str: _text}[hint](node, what)

    def _union(self, node: yaml.Node, hints: tuple[Any, ...], what: str) -> Any:
        """Reads null or another type; of two others one is a list."""
        others = [hint for hint in hints if hint is not NoneType]
        if len(others) < len(hints) and is_null(node):
            if node.value == "~" and get_origin(others[0]) is Annotated:
                raise UserError(f"{what}: `~` alone is YAML's null; write null, or ~/ for the home folder")
            return None
        is_list = isinstance(node, yaml.SequenceNode)
        fitting = [hint for hint in others if (get_origin(hint) is list) == is_list]
        return self._value(node, (fitting or others)[0], what)

    def _list(self, node: yaml.Node, hint: Any, what: str) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            is_section = isinstance(node, yaml.MappingNode)
            remedy = (
                "write [{…}], or begin each entry with a dash"
                if is_section
                else f"write [{describe_node(node).strip('[]()')}]"
            )
            raise _wrong_type(node, what, "a list", remedy)
        if len(node.value) == 1:
            return [self.read(node.value[0], hint, what)]
        return [self.read(one, hint, f"{what}, entry {number}") for number, one in enumerate(node.value, start=1)]

    def _dict(self, node: yaml.Node, hints: tuple[Any, ...], what: str) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong_type(node, what, "names with values, like {name: value}")
        entries = Entries(node, self._source, what)
        self._add_problems(entries.problems, node)
        return {
            self.read(key, hints[0], f"{what}, name"): self.read(value, hints[1], f"{what}.{name}")
            for name, key, value in entries
        }

    def _record(self, node: yaml.Node, kind: type[Any], what: str) -> Any:
        """Reads a dataclass inside of a list or a dictionary; a text stands for one that needs no more than a path."""
        hints = get_type_hints(kind, include_extras=True)
        needed = _required(kind)
        if isinstance(node, yaml.ScalarNode) and not is_null(node) and needs_a_path(kind):
            return kind(**{needed[0]: _path(node, f"{what}.{needed[0]}")})
        if not isinstance(node, yaml.MappingNode):
            shown = needed or list(hints)[:2]
            example = ", ".join(f"{name}: {describe_node(node) if len(shown) == 1 else '…'}" for name in shown)
            raise _wrong_type(node, what, f"a section with {', '.join(hints)}", f"write {{{example}}}")
        before = len(self.problems)
        entries = Entries(node, self._source, what)
        self._add_problems(entries.problems, node)
        given: dict[str, Any] = {}
        for name, key, value in entries:
            if name in hints:
                given[name] = self.read(value, hints[name], f"{what}.{name}")
            else:
                close = difflib.get_close_matches(name.lower(), hints, n=1, cutoff=0.5)
                remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(hints)}"
                self._add_problems([Problem(f"{what}: unknown setting {name!r}; {remedy}")], key)
        missing = [name for name in _required(kind) if name not in given]
        self._add_problems([Problem(f"{what}: {name} is missing; write it") for name in missing], node)
        if len(self.problems) > before:
            return None
        with collected() as refusals:
            record = kind(**given)
        self._add_problems([Problem(f"{what}: {problem.text}") for problem in refusals], node)
        return record


def needs_a_path(kind: type[Any]) -> bool:
    """Tells whether a dataclass needs one path and nothing else, which may then stand for it."""
    hints = get_type_hints(kind, include_extras=True)
    return [hints[name] for name in _required(kind)] == [PathText]


def _required(kind: type[Any]) -> list[str]:
    """Returns the fields of a dataclass that have no default."""
    return [one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is dataclasses.MISSING]


def expand_path(text: str, what: str) -> str:
    """Returns a path with the home folder in the place of `~`. Raises UserError for a URL, and for what only a shell
    would expand."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return path
    if _URL.match(path):
        raise UserError(f"{what}={text!r} is a URL; name a file or folder of this machine, or something on the hub")
    if path.startswith("~"):
        raise UserError(f"{what}={text!r}: there is no such home folder; write ./{text} for a folder of that name here")
    if _VARIABLE.search(path):
        raise UserError(
            f"{what}={text!r} does not exist, and environment variables are not expanded here: write the path itself "
            "(~ stands for the home folder)"
        )
    return path


def _wrong_type(node: yaml.Node, what: str, expected: str, remedy: str = "") -> UserError:
    if is_null(node):
        remedy = "write a value, or remove the setting to use its default"
    return UserError(f"{what}: expected {expected}, got {describe_node(node)}{'; ' if remedy else ''}{remedy}")


def _scalar(node: yaml.Node, what: str, expected: str) -> str:
    if isinstance(node, yaml.ScalarNode) and not is_null(node):
        return text_of(node)
    raise _wrong_type(node, what, expected)


def _truth(node: yaml.Node, what: str) -> bool:
    text = _scalar(node, what, "true or false").lower()
    if text not in TRUTH:
        raise _wrong_type(node, what, "true or false")
    return TRUTH[text]


def _whole(node: yaml.Node, what: str) -> int:
    expected = "a whole number"
    text = _scalar(node, what, expected)
    if not _WHOLE.fullmatch(text):
        raise _wrong_type(node, what, expected, "write decimal digits, without a leading zero")
    if len(text) > 30 or abs(int(text)) > LARGEST:
        raise _wrong_type(node, what, expected, f"it must not exceed {LARGEST}")
    return int(text)


def _number(node: yaml.Node, what: str) -> float:
    expected = "a number"
    text = _scalar(node, what, expected)
    if _LEADING_ZERO.match(text):
        raise _wrong_type(node, what, expected, "write it without a leading zero")
    try:
        value = float(text)
    except ValueError:
        raise _wrong_type(node, what, expected, "write it like 0.001 or 1e-3") from None
    if not math.isfinite(value):
        raise _wrong_type(node, what, expected, "it must be finite")
    return value


def _text(node: yaml.Node, what: str) -> str:
    if isinstance(node, yaml.CollectionNode):
        raise _wrong_type(node, what, "text", "write it in quotes if it is one")
    text = _scalar(node, what, "text")
    if not text.strip():
        raise UserError(f"{what} is empty; write a value, or remove the setting to use its default")
    if _CONTROL.search(text):
        raise UserError(f"{what}={text!r} contains a line break or another control character; remove it")
    return text


def _choice(node: yaml.Node, choices: tuple[str, ...], what: str) -> str:
    expected = f"one of {', '.join(map(repr, choices))}"
    text = _scalar(node, what, expected)
    if text not in choices:
        raise _wrong_type(node, what, expected)
    return text


def _path(node: yaml.Node, what: str) -> str:
    """Reads a path, or the name of something on the hub."""
    if is_null(node) and node.value == "~":
        raise UserError(f"{what}: `~` alone is YAML's null; write ~/ for the home folder")
    return expand_path(_text(node, what), what)
