"""What is wrong with settings: found one by one, and said together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from engine.errors import UserError

SHOWN = 20
"""Problems that one message says: a file with more is another file than was meant."""


@dataclass(frozen=True)
class Problem:
    text: str
    """Names key, value and remedy."""
    key: str = ""
    """Setting that it is about; empty: none."""
    source: str = ""
    """File that it stands in; empty: the command line, or a default."""
    line: int = 0
    """Line of the file, from 1; 0: the whole file."""

    def __str__(self) -> str:
        if not self.source:
            return self.text
        return f"{self.source}, line {self.line}: {self.text}" if self.line else f"{self.source}: {self.text}"


class SettingsError(UserError):
    """All that was found wrong, in one line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        texts = list(map(str, self.problems))
        numbered = " ".join(f"({number}) {text}" for number, text in enumerate(texts[:SHOWN], start=1))
        more = f" … and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        super().__init__(texts[0] if len(texts) == 1 else f"{len(texts)} problems: {numbered}{more}")


def refuse(problems: Iterable[Problem]) -> None:
    """Raises SettingsError if there are any."""
    if found := list(problems):
        raise SettingsError(found)


_collected: ContextVar[list[Problem] | None] = ContextVar("_collected", default=None)


@contextmanager
def collected() -> Iterator[list[Problem]]:
    """Yields the list that `require` adds to inside of the block, in place of raising at the first problem."""
    found: list[Problem] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def require(ok: bool, key: str, value: object, remedy: str) -> None:
    """Raises SettingsError where `ok` is false. Inside of `collected` it goes on: no check may rely on an earlier
    one."""
    if ok:
        return
    problem = Problem(f"{key}={value!r}: {remedy}", key=key)
    found = _collected.get()
    if found is None:
        raise SettingsError([problem])
    found.append(problem)
