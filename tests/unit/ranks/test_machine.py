"""What a process computes on, in words."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.ranks.machine import device_name


def test_a_processor_has_the_name_that_the_system_gives_it() -> None:
    name, _, rest = device_name(torch.device("cpu")).rpartition(" (")
    assert f": {name}\n" in Path("/proc/cpuinfo").read_text()
    assert rest in ("AMX)", "no AMX)")
