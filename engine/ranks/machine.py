"""What a process computes on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or of the processor, with whether it multiplies bf16 matrices in AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0]} ({'AMX' if 'amx_bf16' in info else 'no AMX'})" if names else platform.machine()
