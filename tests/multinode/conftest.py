from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import Hosts, why_not


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    """worker-1 and worker-2 with one slot each, and `login`, where the launcher runs."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts
