"""constraints-oldest.txt is what pyproject.toml promises, so that `make test-oldest` tries nothing newer."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_they_are_the_lower_bounds_of_pyproject() -> None:
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    tried = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()[1:]
    for name, bound in (re.sub(r"\[.*\]", "", one).split(">=") for one in promised):
        [version] = [line.partition("==")[2] for line in tried if line.startswith(f"{name}==")]
        assert version == bound or version.removesuffix(".0") == bound, name
    assert len(tried) == len(promised)
