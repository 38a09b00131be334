"""Hashes of source."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from engine.errors import UserError
from engine.records.fingerprints import source_hash


def first(model: Any) -> dict[str, float]:
    return {"task": 1.0}


def second(model: Any) -> dict[str, float]:
    return {"task": 2.0}


class Base:
    def __call__(self, model: Any) -> dict[str, float]:
        return {"task": 1.0}


class Extended(Base):
    pass


def test_functions_and_classes_are_told_by_their_source() -> None:
    codes = [first, second, Base, Extended]
    hashes = [source_hash(code) for code in codes]
    assert len(set(hashes)) == 4
    assert [source_hash(code) for code in codes] == hashes


NO_SOURCE = [len, functools.partial(first), eval("lambda model: {}"), Base()]


@pytest.mark.parametrize("code", NO_SOURCE, ids=["builtin", "partial", "typed", "object"])
def test_what_has_no_source_is_refused(code: Any) -> None:
    with pytest.raises(UserError, match="cannot be read, by which a later start could tell that it is the same"):
        source_hash(code)
