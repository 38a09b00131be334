"""Where this library lies, with the folders that belong to it: in a clone, or in an installation (setup.py)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package `engine`: a clone, or site-packages."""
_INSTALLED = ROOT / "mapdistill"
IS_INSTALLED = (_INSTALLED / "launch").is_dir()
SHIPPED = _INSTALLED if IS_INSTALLED else ROOT
"""Folder that holds `launch`, `ds_configs` and `examples`."""

RANKED = ("distill", "finetune", "proxy")
"""Scripts that run as ranks, which DeepSpeed's launcher starts."""


def shipped_file(path: str) -> Path:
    """Returns a file by its path, or the one that this library brings under that name (`examples/quickstart.yaml`,
    `ds_configs/zero2_bf16.json`) where the current folder has none."""
    brought = SHIPPED / path
    return brought if brought.is_file() and not Path(path).exists() else Path(path)


def command(script: str) -> str:
    """Returns what starts a script of `launch`, as a user of a clone or of an installation types it."""
    if IS_INSTALLED:
        return f"mapdistill {script}"
    return f"{'deepspeed' if script in RANKED else 'python'} launch/{script}.py"
