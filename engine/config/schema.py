"""The settings that a configuration dataclass has: names, types, defaults and documentation."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

from engine.config.deepspeed_file import NAMES

ELSEWHERE = {*NAMES["zero_optimization"], *NAMES["bf16"], *NAMES["fp16"], "zero_optimization", "bf16", "fp16"} | {
    "train_micro_batch_size_per_gpu"
}
"""Names that DeepSpeed's file has, and no configuration."""


def documented(cls: type[Any]) -> dict[str, str]:
    """Returns field -> the string literal that follows it in the source, of the class or of one that it extends."""
    docs: dict[str, str] = {}
    for one in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for node, following in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
            ):
                value = following.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docs[node.target.id] = " ".join(value.value.split())
    return docs


@dataclass(frozen=True)
class Setting:
    key: str
    """`section.name`, or `name` at the top level."""
    hint: Any
    """Type, with annotations."""
    default: Any
    """MISSING: it is required."""
    owner: type[Any]
    """Dataclass that has it."""


class Schema:
    """Of one configuration class: sections are its fields that are dataclasses themselves."""

    def __init__(self, config_class: type[Any]) -> None:
        self.sections: dict[str, Any] = {}
        """Name -> the section with all of its defaults."""
        self.settings: dict[str, Setting] = {}
        """By key, in the order of the source."""
        for name, hint, default in _fields(config_class):
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                self.sections[name] = default
                for inner, inner_hint, _ in _fields(type(default)):
                    key = f"{name}.{inner}"
                    self.settings[key] = Setting(key, inner_hint, getattr(default, inner), type(default))
            else:
                self.settings[name] = Setting(name, hint, default, config_class)

    def hint(self, unknown: str) -> str:
        """What somebody may have meant by a name that is no setting."""
        name = unknown.lower().replace("-", "_")
        above, _, leaf = name.rpartition(".")
        if leaf in self.sections:
            if above:
                return f"{leaf!r} is a section of the top level: mind the indentation"
            return f"{leaf!r} is a section: name a setting of it, like {self._first_of(leaf)!r}"
        namesakes = [key for key in self.settings if key.rpartition(".")[2] == leaf]
        if namesakes:
            return f"did you mean {' or '.join(map(repr, namesakes))}?"
        if name in ELSEWHERE and "deepspeed_config" in self.settings:
            return f"{name!r} belongs into the DeepSpeed JSON that deepspeed_config names"
        close = difflib.get_close_matches(name, self.settings, n=1, cutoff=0.5)
        return f"did you mean {close[0]!r}?" if close else "--help lists every setting"

    def _first_of(self, section: str) -> str:
        return next(key for key in self.settings if key.startswith(f"{section}."))


def _fields(config_class: type[Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, type, default) of each field."""
    hints = get_type_hints(config_class, include_extras=True)
    return [
        (one.name, hints[one.name], one.default if one.default_factory is MISSING else one.default_factory())
        for one in dataclasses.fields(config_class)
    ]
