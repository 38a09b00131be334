"""Files of settings as text and as YAML nodes, which know their lines. JSON is read as the YAML that it is."""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path

import yaml

from engine.config.checks import Problem, SettingsError

NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"
PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "value", "merge")
)


def read_text(path: Path) -> str:
    """Returns the text of a file, without a byte order mark. Raises SettingsError if it cannot be read or is not
    UTF-8."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError([Problem(f"cannot be read: {reason}", source=str(path))]) from None
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise SettingsError([Problem("is UTF-16 text; save it as UTF-8", source=str(path))])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        text = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise SettingsError([Problem(text, source=str(path), line=line)]) from None


def compose(text: str, source: str) -> yaml.Node | None:
    """Returns the one document of a text, None for an empty one. Raises SettingsError."""
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")  # JSON is indented with tabs too, which YAML does not take
    try:
        documents = [node for node in yaml.compose_all(text, yaml.SafeLoader) if not _is_empty(node)]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = Problem(f"character {error.character:#x} is not allowed in text; remove it", source=source, line=line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, [error.problem, error.context]))
        remedy = "; indent with spaces" if "'\\t'" in what else ""
        problem = Problem(f"not valid YAML: {what}{remedy}", source=source, line=mark.line + 1)
    except RecursionError:
        problem = Problem("nested too deeply", source=source)
    else:
        if len(documents) <= 1:
            return documents[0] if documents else None
        line = documents[1].start_mark.line + 1
        problem = Problem("a second document begins (`---`); write one file for each", source=source, line=line)
    raise SettingsError([problem])


def _is_empty(node: yaml.Node) -> bool:
    return is_null(node) and not node.value


def is_null(node: yaml.Node) -> bool:
    """Tells whether a node is null, `~` or nothing at all."""
    return bool(node.tag == NULL)


def line_of(node: yaml.Node) -> int:
    """Returns the line of a node, from 1; 0 for what a command line says."""
    return node.start_mark.line + 1 if node.start_mark else 0


def text_of(node: yaml.ScalarNode) -> str:
    """Returns the text as it is written. JSON writes what is beyond 16 bits as two escapes, which YAML leaves apart."""
    text: str = node.value
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def describe_node(node: yaml.Node) -> str:
    """Returns what stands there, in a few words."""
    if isinstance(node, yaml.MappingNode):
        return "a section"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if is_null(node):
        return node.value or "nothing"
    text = text_of(node)
    shown = text[:60] if text[:60].isprintable() and text.strip() else repr(text[:60])
    return shown if len(text) <= 60 else f"{shown} … ({len(text)} characters)"


class Entries:
    """Keys and values of a mapping, and what is wrong with them.

    `<<` brings the entries of other mappings, where this one has none of that name.
    """

    def __init__(
        self, node: yaml.MappingNode, source: str, what: str = "", within: tuple[yaml.MappingNode, ...] = ()
    ) -> None:
        """what: name of the mapping in messages; empty: it is the file. within: what merges it."""
        self.problems: list[Problem] = []
        self._source, self._what = source, what
        self._nodes: dict[str, list[tuple[yaml.Node, yaml.Node]]] = {}
        merged: list[yaml.MappingNode] = []
        for key, value in node.value:
            if key.tag == MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif isinstance(key, yaml.ScalarNode):
                self._nodes.setdefault(text_of(key), []).append((key, value))
            else:
                self._add_problem(f"{describe_node(key)} cannot be the name of a setting", key)
        self._refuse_repeated()
        for one in merged:
            self._merge(one, within=(*within, node))

    def __iter__(self) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Yields name, node of the name, and node of the value."""
        return ((name, *pair) for name, pairs in self._nodes.items() for pair in pairs)

    def _add_problem(self, text: str, node: yaml.Node) -> None:
        self.problems.append(Problem(text, source=self._source, line=line_of(node)))

    def _refuse_repeated(self) -> None:
        for name, pairs in self._nodes.items():
            if len(pairs) > 1:
                full = f"{self._what}.{name}" if self._what else name
                times = "twice" if len(pairs) == 2 else f"{len(pairs)} times"
                lines = [str(line_of(key)) for key, _ in pairs if line_of(key)]
                where = f", lines {', '.join(lines[:-1])} and {lines[-1]}" if len(set(lines)) > 1 else ""
                self._add_problem(f"{full} occurs {times}{where}; keep one", pairs[-1][0])

    def _merge(self, node: yaml.Node, within: tuple[yaml.MappingNode, ...]) -> None:
        if not isinstance(node, yaml.MappingNode) or node in within:
            self._add_problem(f"`<<` needs another section, got {describe_node(node)}", node)
            return
        inherited = Entries(node, self._source, self._what, within)
        self.problems += inherited.problems
        for name, key, value in inherited:
            self._nodes.setdefault(name, [(key, value)])
