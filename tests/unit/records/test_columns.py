"""Text for terminals."""

from __future__ import annotations

import pytest

from engine.records.columns import duration_text


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10 s"), (61, "1 min 01 s"), (3600 * 5 + 59, "5 h 00 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
