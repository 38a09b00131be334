"""Configurations from command line and files: every problem of all of them is found before one is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from engine import __version__
from engine.config.checks import Problem, SettingsError, collected, refuse
from engine.config.help import help_text
from engine.config.nodes import NULL, TEXT, Entries, compose, describe_node, is_null, line_of, read_text
from engine.config.places import shipped_file
from engine.config.schema import Schema
from engine.config.values import Reader, expand_path
from engine.errors import EXIT_DONE, UserError
from engine.records.run_dir import as_yaml

ConfigT = TypeVar("ConfigT")
Settings = Any
"""Settings of a program: the path of a YAML file, a mapping with sections or with names like `train.steps`, or a
configuration."""


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str], usage: str, announce: Callable[[str], None] = lambda line: None
) -> ConfigT:
    """Returns the resolved configuration: the command line wins over files, and what stands later over what stands
    earlier. `--help`, `--version` and `--print_config` print and end the process. Raises SettingsError with all that is
    wrong.

    usage: the beginning of the help. announce: is told, in one line, where the settings come from.
    """
    schema = Schema(config_class)
    options, problems = split_options(argv)
    asked = dict(options)
    topic = asked.get("--help", asked.get("-h"))
    if topic is not None:
        print(help_text(schema, usage, *topic[:1]), end="")
        raise SystemExit(EXIT_DONE)
    if "--version" in asked:
        print(f"mapdistill {__version__}")
        raise SystemExit(EXIT_DONE)
    files = [_File(words) for name, words in options if name == "--config"]
    typed = [_Option(name, words) for name, words in options if name not in ("--config", "--print_config")]
    layers = [file.read(schema) for file in files]
    layers.append({key: one for option in typed for key, one in option.read(schema).items()})
    problems += [problem for file in files for problem in file.problems]
    problems += [problem for option in typed for problem in option.problems]
    given = {key: one for layer in layers for key, one in layer.items()}
    config = _build(config_class, schema, given, problems)
    if "--print_config" in asked:
        print(as_yaml(config), end="")
        raise SystemExit(EXIT_DONE)
    announce(_origin([*(file.path for file in files), "command line"], layers))
    return config


def _origin(names: Sequence[str], layers: Sequence[dict[str, Given]]) -> str:
    """Returns the files with what each replaces of those before it, and all that the command line, the last, sets."""
    before: dict[str, Given] = {}
    parts = [] if len(names) > 1 else ["the defaults"]
    for name, layer in zip(names, layers, strict=True):
        is_file = layer is not layers[-1]
        changes = [
            f"{key}={_shown(setting.value)}" + (f" (was {_shown(before[key].value)})" if key in before else "")
            for key, setting in layer.items()
            if (before[key].value != setting.value if key in before else not is_file)
        ]
        if changes or is_file:
            parts.append(f"{name}: {', '.join(changes)}" if changes else name)
        before |= layer
    return "; ".join(parts)


def _shown(value: Any) -> Any:
    """Returns the value with sections as what was written of them."""
    if is_dataclass(value):
        written = {one.name: getattr(value, one.name) for one in fields(value)}
        return {one.name: _shown(written[one.name]) for one in fields(value) if written[one.name] != one.default}
    if isinstance(value, dict):
        return {name: _shown(one) for name, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Given:
    """A setting as it was given."""

    value: Any
    source: str = ""
    """File; empty: the command line."""
    line: int = 0


def split_options(argv: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[Problem]]:
    """Returns each `--name` with the words up to the next (`--name=value` has one), and what stands before all."""
    options: list[tuple[str, list[str]]] = []
    problems: list[Problem] = []
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            problems.append(Problem(f"unexpected {word!r}: write --config FILE, or --section.name VALUE"))
    return options, problems


def read_config(config_class: type[ConfigT], *settings: Settings) -> ConfigT:
    """Returns the resolved configuration of a program: files, mappings and configurations of this class, of which a
    later one wins over an earlier one. Raises SettingsError with all that is wrong."""
    schema = Schema(config_class)
    layers: list[_File] = []
    for one in settings:
        if isinstance(one, str | PurePath):
            layers.append(_File([str(one)]))
        elif type(one) is config_class:
            config: Any = one
            layers.append(_Values(asdict(config)))
        elif isinstance(one, Mapping):
            layers.append(_Values(one))
        else:
            raise UserError(f"expected a file, a mapping or a {config_class.__name__}, got {one!r:.200}")
    given = {key: value for layer in layers for key, value in layer.read(schema).items()}
    return _build(config_class, schema, given, [problem for layer in layers for problem in layer.problems])


class _File:
    """A `--config`, with what is wrong in it."""

    def __init__(self, words: list[str]) -> None:
        self.problems: list[Problem] = []
        self._words = words
        self.path = ""

    def read(self, schema: Schema) -> dict[str, Given]:
        given: dict[str, Given] = {}
        try:
            self._add_section(self._top(), "", schema, given)
        except SettingsError as error:
            self.problems += error.problems
        except UserError as error:
            self.problems.append(Problem(str(error)))
        return given

    def _add_problem(self, text: str, node: yaml.Node, key: str = "") -> None:
        self.problems.append(Problem(text, key=key, source=self.path, line=line_of(node)))

    def _top(self) -> yaml.MappingNode:
        if len(self._words) != 1 or not self._words[0]:
            raise UserError(f"--config takes one file, got {' '.join(self._words) or 'none'}")
        self.path = str(shipped_file(expand_path(self._words[0], "--config")))
        text = read_text(Path(self.path))
        if not text.strip():
            raise SettingsError([Problem("is empty; omit it to use the defaults", source=self.path)])
        node = compose(text, self.path)
        if node is None:  # comments alone: every setting has its default
            return yaml.MappingNode(tag="", value=[])
        if not isinstance(node, yaml.MappingNode):
            text = f"expected settings like `output_dir: runs/first`, got {describe_node(node)}"
            raise SettingsError([Problem(text, source=self.path, line=line_of(node))])
        return node

    def _add_section(self, node: yaml.MappingNode, above: str, schema: Schema, given: dict[str, Given]) -> None:
        """Adds the settings of a section to `given`. above: `section.`, or empty for the whole file."""
        entries = Entries(node, self.path, above.removesuffix("."))
        self.problems += entries.problems
        here: set[str] = set()
        for name, key_node, value in entries:
            key = above + name
            if key in schema.sections:
                if isinstance(value, yaml.MappingNode):
                    self._add_section(value, f"{key}.", schema, given)
                elif not is_null(value):  # a section without any setting has its defaults
                    self._add_problem(
                        f"{key} is a section: write its settings indented below it, not {describe_node(value)}", value
                    )
            elif key in schema.settings:
                if key in given and key not in here:
                    lines = f"lines {given[key].line} and {line_of(key_node)}"
                    self._add_problem(f"{key} occurs twice, {lines}; keep one", key_node)
                reader = Reader(key, self.path)
                given[key] = Given(reader.read(value, schema.settings[key].hint, key), self.path, line_of(key_node))
                self.problems += reader.problems
                here.add(key)
            else:
                is_rest = node.flow_style and is_null(value) and not value.value  # of {lr: 0,5}
                hint = "a value with a comma in it needs quotes" if is_rest else schema.hint(key)
                self._add_problem(f"unknown setting {key!r}; {hint}", key_node)


class _Values(_File):
    """Settings of a program, with what is wrong in them; they are read as those of a file are."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__([])
        self._values = values

    def _top(self) -> yaml.MappingNode:
        try:
            text = yaml.dump(dict(self._values), Dumper=_Dumper, sort_keys=False)
        except yaml.representer.RepresenterError as error:
            raise UserError(
                f"settings cannot be {error.args[-1]!r:.200}; give texts, numbers, lists or mappings"
            ) from None
        node = compose(text, "")
        assert isinstance(node, yaml.MappingNode)
        return node


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Paths are texts."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


class _Option:
    """A setting on the command line, with what is wrong in it."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.problems: list[Problem] = []
        self._key, self._words = name.removeprefix("--"), words

    def read(self, schema: Schema) -> dict[str, Given]:
        if self._key not in schema.settings:
            self.problems = [Problem(f"unknown setting {self._key!r}; {schema.hint(self._key)}")]
            return {}
        hint = schema.settings[self._key].hint
        alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        try:
            node = self._node({get_origin(one) or one for one in alternatives})
        except UserError as error:
            self.problems = [Problem(f"{self._key}: {error}", key=self._key)]
            return {}
        reader = Reader(self._key, "")
        value = reader.read(node, hint, self._key)
        self.problems = reader.problems
        return {self._key: Given(value)}

    def _node(self, kinds: set[Any]) -> yaml.Node:
        """Returns the words as a node; what is no list or dictionary is taken as it is written.

        kinds: the types that the setting may have.
        """
        words = self._words or (["true"] if bool in kinds else [])
        if not words:
            raise UserError("a value is missing")
        if len(words) == 1:
            is_yaml = dict in kinds or (list in kinds and words[0].lstrip().startswith(("[", "{")))
            if is_yaml:
                return compose(words[0], "") or _scalar("null")
            if list not in kinds or str in kinds or words[0] == "null":
                return _scalar(words[0])
            words = words[0].split(",")  # 0.9,0.98
        elif list not in kinds:
            raise UserError(f"takes one value, got {len(words)}; write one with spaces in quotes")
        return yaml.SequenceNode(tag="tag:yaml.org,2002:seq", value=list(map(_scalar, words)))


def _scalar(word: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(tag=NULL if word == "null" else TEXT, value=word)


def _build(config_class: type[ConfigT], schema: Schema, given: dict[str, Given], problems: list[Problem]) -> ConfigT:
    """Returns the configuration. Raises SettingsError for `problems` and those that the classes find themselves: of a
    section whose values could be read, and of the whole if that holds for all of it."""
    for key, setting in schema.settings.items():
        if setting.default is MISSING and key not in given:
            problems.append(Problem(f"{key} is missing; write --{key} VALUE, or {key} in a file", key=key))
    unreadable = {problem.key.partition(".")[0] for problem in problems if problem.key}
    values: dict[str, dict[str, Any]] = {name: {} for name in ("", *schema.sections)}
    for key, setting_given in given.items():
        section, _, name = key.rpartition(".")
        values[section][name] = setting_given.value
    with collected() as refusals:
        sections = {
            name: replace(default, **values[name])
            for name, default in schema.sections.items()
            if name not in unreadable
        }
        config = None if unreadable else config_class(**values[""], **sections)
    refuse(_sort_by_place([*problems, *(_locate(problem, given) for problem in refusals)]))
    assert config is not None
    return config


def _locate(problem: Problem, given: dict[str, Given]) -> Problem:
    """Returns the problem with file and line of its setting, or of the one that holds it."""
    key = problem.key
    while key and key not in given:
        key = key.rpartition(".")[0]
    at = given.get(key, Given(None))
    return replace(problem, source=at.source, line=at.line)


def _sort_by_place(problems: list[Problem]) -> list[Problem]:
    """Returns the problems by file and line; those that have none, at the end."""
    return sorted(problems, key=lambda one: (not one.source, one.source, one.line))
